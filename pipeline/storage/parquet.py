"""Parquet bytes to a table, in the calling thread and nowhere else.

Knows nothing of rows or manifests. pyarrow's `read_table` reads through a thread pool of its own. Its threads may still
let go of the Python object they read from when the interpreter ends; they then wait for a lock that nobody hands out
any more, and the process dies of "terminate called without an active exception" after its work is done
(apache/arrow#34314). A night's job must not exit with 134 because it printed its scores and left.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(data: bytes, columns: Sequence[str] | None = None, *, optional: Collection[str] = ()) -> pa.Table:
    """A whole Parquet file, its page checksums verified where it has them.

    Args:
        data: the file.
        columns: to read; None reads all.
        optional: those of them that the file may lack; they are left out then.

    Raises:
        pa.ArrowException, OSError: not a readable Parquet file, or one without these columns.
    """
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        wanted = None if columns is None else [name for name in columns if name in names or name not in optional]
        if missing := [name for name in wanted or () if name not in names]:
            raise pa.ArrowInvalid(f"no column {', '.join(missing)}; it has {', '.join(names)}")
        return file.read(columns=wanted, use_threads=False)

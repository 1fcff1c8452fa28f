"""Reads Parquet bytes into a table, in the calling thread only.

pyarrow's `read_table` reads in a thread pool of its own. The threads may release the Python object that they read from
while the interpreter ends. They then wait for a lock that is never given, and the process dies of "terminate called
without an active exception" after its work is done (apache/arrow#34314). A scheduled job must not exit with 134 after
it has printed its scores.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(data: bytes, columns: Sequence[str] | None = None, *, optional: Collection[str] = ()) -> pa.Table:
    """Read a whole Parquet file, and verify its page checksums where it has them.

    Args:
        data: content of the file.
        columns: columns to read; None reads all.
        optional: columns that the file may lack; a missing one is left out.

    Raises:
        pa.ArrowException, OSError: the file is no readable Parquet file, or lacks a column.
    """
    with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        wanted = None if columns is None else [name for name in columns if name in names or name not in optional]
        if missing := [name for name in wanted or () if name not in names]:
            raise pa.ArrowInvalid(f"no column {', '.join(missing)}; it has {', '.join(names)}")
        return file.read(columns=wanted, use_threads=False)

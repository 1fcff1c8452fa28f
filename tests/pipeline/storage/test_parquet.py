"""Tests that reading Parquet leaves no thread behind that could abort the process at its end."""

import io
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage.parquet import read_table

_COUNT_THREADS = """
import os, sys
from pipeline.storage.parquet import read_table
data = open(sys.argv[1], "rb").read()
before = len(os.listdir("/proc/self/task"))
for _ in range(3):
    read_table(data)
print(before, len(os.listdir("/proc/self/task")))
"""


def _bytes(**kwargs) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"n": list(range(1000)), "s": ["x"] * 1000, "l": [["a", "b"]] * 1000})
    pq.write_table(table.replace_schema_metadata({"k": "v"}), sink, row_group_size=100, **kwargs)
    return sink.getvalue()


def test_a_read_starts_no_thread(tmp_path):
    path = tmp_path / "part.parquet"
    path.write_bytes(_bytes())
    command = [sys.executable, "-c", _COUNT_THREADS, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    before, after = done.stdout.split()
    assert before == after


def test_rows_columns_and_metadata_are_those_of_pyarrow():
    data = _bytes()
    assert read_table(data).equals(pq.read_table(io.BytesIO(data)), check_metadata=True)
    assert read_table(data, ["s"]).column_names == ["s"]


def test_a_missing_column_and_a_flipped_bit_are_errors():
    with pytest.raises(pa.ArrowInvalid, match="no column gone"):
        read_table(_bytes(), ["n", "gone"])
    damaged = bytearray(_bytes(write_page_checksum=True, compression="none", use_dictionary=False))
    damaged[100] ^= 1
    with pytest.raises((pa.ArrowException, OSError), match=r"(?i)crc|checksum"):
        read_table(bytes(damaged))

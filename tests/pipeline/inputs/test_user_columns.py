"""Tests that the other columns of a user's manifest keep their types on the way into the rows.

Takes 3 s of the five minutes.
"""

from __future__ import annotations

import datetime
import json
import math

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs.build_manifest import build_manifest
from pipeline.inputs.manifest import manifest_bytes, read_manifest
from pipeline.inspection.verify import verify_run
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.runs.retry import begin_retry
from pipeline.runs.run import open_run
from pipeline.storage import storage
from tests.support.runs.run_folders import complete

DAY = datetime.date(2026, 11, 30)
VALUES = {
    "count": [3, None, 7],
    "weight": [0.5, math.nan, 2.0],
    "is_new": [True, False, None],
    "split": ["train", None, "test"],
    "tags": [["a", "b"], [], None],
    "box": [[0, 1, 2], None, [3]],
    "source": [{"camera": "north", "fps": 25}, {"camera": None, "fps": 30}, None],
}


def rows_of(root, table: pa.Table, name="m.parquet"):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write_atomic(storage.join(root, name), sink.getvalue().to_pybytes())
    return storage.join(root, name)


@pytest.fixture
def finished(config, tmp_path):
    """Makes a finished run of a manifest, and gives the rows as DuckDB reads them."""

    def run(manifest, number=0):
        job = config(input={"manifest": manifest}, output={"uri": f"{tmp_path}/out-{number}", "items_per_shard": 2})
        opened = open_run(job)
        complete(opened)
        assert verify_run(opened.uri) == []
        return opened

    return run


def described(run) -> dict[str, str]:
    found = duckdb.sql(f"DESCRIBE SELECT * FROM read_parquet('{run.uri}/data/*.parquet', union_by_name = true)")
    return {name: kind for name, kind, *_ in found.fetchall() if name.startswith("user_")}


def test_a_parquet_manifests_columns_keep_their_types(finished, tmp_path):
    table = pa.table(
        {
            "uri": [f"s3://bucket/{n}.mp4" for n in range(3)],
            **VALUES,
            "day": [DAY, None, DAY],
            "at": pa.array([1, None, 3], pa.timestamp("s", "UTC")),
            "small": pa.array([1, 2, None], pa.uint8()),
            "half": pa.array([1.5, None, 2.0], pa.float16()),
            "kind": pa.array(["x", "y", None]).dictionary_encode(),
            "nothing": pa.nulls(3),
        }
    )
    run = finished(rows_of(str(tmp_path), table))
    assert described(run) == {
        "user_at": "TIMESTAMP WITH TIME ZONE",
        "user_box": "BIGINT[]",
        "user_count": "BIGINT",
        "user_day": "DATE",
        "user_half": "FLOAT",
        "user_is_new": "BOOLEAN",
        "user_kind": "VARCHAR",
        "user_nothing": "VARCHAR",
        "user_small": "UTINYINT",
        "user_source": "STRUCT(camera VARCHAR, fps BIGINT)",
        "user_split": "VARCHAR",
        "user_tags": "VARCHAR[]",
        "user_weight": "DOUBLE",
    }
    found = pq.read_table(f"{run.uri}/data")
    assert found["user_count"].to_pylist() == [3, None, 7]
    assert found["user_weight"].to_pylist() == [0.5, None, 2.0], "NaN is a missing value"
    assert found["user_source"].to_pylist() == VALUES["source"]
    assert dict(found["fields"].to_pylist()[0])["count"] == "3", "the map stays for one release"


def test_json_lines_are_typed_where_one_type_holds_all(finished, tmp_path):
    lines = [
        {"uri": f"s3://bucket/{n}.mp4"} | {name: values[n] for name, values in VALUES.items() if values[n] is not None}
        for n in range(3)
    ]
    strange = {"mixed": [1, "a", None], "or_not": [True, 1, 2], "huge": [2**70, 1, 1], "empty": [{}, {}, {}]}
    for n, line in enumerate(lines):
        line |= {name: values[n] for name, values in strange.items()}
    text = "\n".join(json.dumps(line) for line in lines)
    storage.write_atomic(f"{tmp_path}/m.jsonl", text.encode())
    run = finished(f"{tmp_path}/m.jsonl")
    kinds = described(run)
    assert {name: kinds.pop(f"user_{name}") for name in strange} == dict.fromkeys(strange, "VARCHAR")
    assert kinds == {
        "user_box": "BIGINT[]",
        "user_count": "BIGINT",
        "user_is_new": "BOOLEAN",
        "user_source": "STRUCT(camera VARCHAR, fps BIGINT)",
        "user_split": "VARCHAR",
        "user_tags": "VARCHAR[]",
        "user_weight": "DOUBLE",
    }


def test_a_csv_has_texts(finished, tmp_path):
    storage.write_atomic(f"{tmp_path}/m.csv", b"uri,zip\ns3://bucket/a.mp4,007\n")
    assert described(finished(f"{tmp_path}/m.csv")) == {"user_zip": "VARCHAR"}


def test_the_types_change_no_digest_and_live_through_freezing(config, tmp_path):
    """A run that was begun before goes on, and its parts have the columns that its first ones have: none."""
    uri = rows_of(str(tmp_path), pa.table({"uri": ["s3://bucket/a.mp4"], "count": np.array([3])}))
    manifest = build_manifest(config(input={"manifest": uri}))
    bare = manifest.table.drop_columns(["typed:count"])
    again = read_manifest(manifest_bytes(manifest))
    assert again.digest == manifest.digest
    assert again.user_columns(0, 1)["count"].to_pylist() == [3]
    sink = pa.BufferOutputStream()
    pq.write_table(bare, sink)  # as an earlier version wrote it
    before = read_manifest(sink.getvalue().to_pybytes())
    assert before.digest == manifest.digest
    assert before.holds(manifest)
    assert before.user_columns(0, 1) == {}


def test_a_retry_keeps_them_and_verify_sees_other_values(finished, tmp_path):
    rows = pa.table({"uri": [f"s3://bucket/{n}.mp4" for n in range(10)], "count": list(range(10))})
    run = finished(rows_of(str(tmp_path), rows))
    complete(begin_retry(run.uri))  # the tenth row failed
    assert pq.read_table(f"{run.uri}/data")["user_count"].to_pylist() == list(range(10))
    assert verify_run(run.uri) == []
    assert [len(table) for table in read_parts(run.uri, list_parts(run.uri))] == [2] * 5, "our columns alone"
    path = f"{run.uri}/data/part-00000.parquet"
    part = pq.read_table(path)
    changed = part.set_column(part.column_names.index("user_count"), "user_count", [pa.array([0, 5])])
    pq.write_table(changed, path)
    assert [str(one) for one in verify_run(run.uri)] == [
        "differs_from_manifest: data/part-00000.parquet: user_count has other values than the manifest"
    ]
    pq.write_table(part.drop_columns(["user_count"]), path)
    assert "missing or foreign: ['user_count']" in str(verify_run(run.uri)[0])

"""Tests parts: one object per shard, the fixed schema, rows checked before they are written."""

import dataclasses
import errno
import io
import os

import pyarrow.parquet as pq
import pytest

from pipeline.errors import StorageError
from pipeline.records import ResultRow
from pipeline.runs.parquet_sink import SCHEMA, ParquetSink, list_parts, part_index, part_name, read_rows
from pipeline.runs.run import open_run, pending_shards
from pipeline.storage import storage
from tests.support.runs.run_folders import complete, make_config, make_row, put_media, shard_rows


@pytest.fixture
def run(model_folder, root):
    put_media(storage.join(root, "in"), 10)
    sections = {"input": {"uri": storage.join(root, "in")}, "output": {"uri": storage.join(root, "out")}}
    return open_run(make_config(model_folder, **sections))


@pytest.fixture
def local_run(model_folder, tmp_path):
    put_media(str(tmp_path / "in"), 10)
    return open_run(
        make_config(model_folder, input={"uri": str(tmp_path / "in")}, output={"uri": str(tmp_path / "out")})
    )


def test_rows_come_back_as_they_were_published(run):
    items = run.shard(0).items
    rows = [
        make_row(run, 0, items[0], options=("a", "b"), fields={"k": "v", "a": ""}, score=0.5, text="grüße\n\x00\u2028"),
        make_row(run, 0, items[1], status="partial", error_message="ends after 3 of 8 frames"),
        make_row(run, 0, items[2], pages=({"page": 0, "text": "p"}, {"page": 1, "status": "failed"})),
        make_row(run, 0, items[3], frame_timestamps_s=(), media_etag=None),
    ]
    uri = ParquetSink(run).publish(0, rows[::-1])  # any order in, manifest order out
    table = read_rows(uri)
    assert table.schema.equals(SCHEMA)
    back = table.to_pylist()
    assert [r["item_id"] for r in back] == [item.item_id for item in items]
    assert back[0]["options"] == ["a", "b"]
    assert sorted(back[0]["fields"]) == [("a", ""), ("k", "v")]
    assert back[0]["text"] == "grüße\n\x00\u2028"
    assert back[1]["error_message"] == "ends after 3 of 8 frames"
    assert [page["page"] for page in back[2]["pages"]] == [0, 1]
    for name in ("latency_s", "num_vision_tokens_kept", "cost_usd", "attempts", "uris", "run_fingerprint"):
        expected = getattr(rows[0], name)
        assert back[0][name] == (list(expected) if isinstance(expected, tuple) else expected)
    metadata = table.schema.metadata
    assert metadata[b"illava.schema_version"] == b"3"
    assert metadata[b"illava.manifest_digest"].decode() == run.manifest.digest
    assert metadata[b"illava.run_fingerprint"].decode() == run.fingerprint
    assert (metadata[b"illava.attempt"], metadata[b"illava.shard_index"]) == (b"1", b"0")


def test_the_schema_is_the_row_field_by_field():
    assert SCHEMA.names == [f.name for f in dataclasses.fields(ResultRow)]
    text = {f.name for f in SCHEMA if str(f.type) == "string"}
    assert {"item_id", "text", "status", "prompt", "plan_digest"} <= text
    assert {str(SCHEMA.field(n).type) for n in SCHEMA.names if n.endswith("_s") and n != "frame_timestamps_s"} == {
        "double"
    }
    optional = {f.name for f in dataclasses.fields(ResultRow) if "None" in str(f.type)}
    assert optional == {f.name for f in SCHEMA if f.nullable}


def test_a_plain_read_of_the_folder_is_the_whole_run(local_run):
    complete(local_run)
    table = pq.read_table(os.path.join(local_run.uri, "data"))
    assert sorted(table["item_id"].to_pylist()) == sorted(local_run.manifest.item_ids())
    assert set(table["shard_index"].to_pylist()) == {0, 1, 2}


def test_publishing_twice_is_publishing_once(run):
    sink = ParquetSink(run)
    sink.publish(0, shard_rows(run, 0))
    sink.publish(0, shard_rows(run, 0))
    assert list_parts(run.uri) == [0]
    assert read_rows(storage.join(run.uri, "data", part_name(0))).num_rows == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda rows: rows[:-1], r"needs 4 rows and was given 3; missing"),
        (lambda rows: [*rows, rows[0]], r"doubled"),
        (lambda rows: [*rows[:-1], rows[0]], r"missing .*doubled"),
        (lambda rows: [*rows[:-1], dataclasses.replace(rows[-1], item_id="foreign")], r"foreign \['foreign'\]"),
        (
            lambda rows: [dataclasses.replace(r, shard_index=1) for r in rows],
            "another run, config fingerprint or shard",
        ),
        (
            lambda rows: [dataclasses.replace(r, run_fingerprint="x") for r in rows],
            "another run, config fingerprint or shard",
        ),
        (
            lambda rows: [dataclasses.replace(r, recipe_digest="x") for r in rows],
            "another run, config fingerprint or shard",
        ),
        (lambda rows: [dataclasses.replace(r, status="failed") for r in rows], "failed rows name one"),
        (lambda rows: [dataclasses.replace(r, error_type="not_found") for r in rows], "failed rows name one"),
        (
            lambda rows: [dataclasses.replace(r, status="failed", error_type="oops") for r in rows],
            "not on the closed list",
        ),
        (lambda rows: [dataclasses.replace(r, status="done") for r in rows], "status 'done'"),
        (lambda rows: [dataclasses.replace(r, text=None) for r in rows], "column text: a row without a value"),
        (lambda rows: [dataclasses.replace(r, num_frames="many") for r in rows], "column num_frames"),
        (lambda rows: [dataclasses.replace(r, text="\ud800") for r in rows], "column text"),
    ],
)
def test_rows_that_do_not_fit_are_never_written(local_run, damage, message):
    with pytest.raises(StorageError, match=message):
        ParquetSink(local_run).publish(0, damage(shard_rows(local_run, 0)))
    assert pending_shards(local_run) == [0, 1, 2]
    assert storage.list_names(storage.join(local_run.uri, "data")) == []


def test_an_error_message_is_made_printable_and_bounded(local_run):
    rows = shard_rows(local_run, 0)
    rows[0] = dataclasses.replace(
        rows[0], status="failed", error_type="corrupt_media", error_message="\x1b[31m\ud800" * 999
    )
    message = read_rows(ParquetSink(local_run).publish(0, rows)).to_pylist()[0]["error_message"]
    assert len(message) == 2000
    assert "\x1b" not in message


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "none"])
def test_every_compression_writes_readable_parts(model_folder, tmp_path, compression):
    put_media(str(tmp_path / "in"), 2)
    out = {"uri": str(tmp_path / "out"), "compression": compression}
    run = open_run(make_config(model_folder, input={"uri": str(tmp_path / "in")}, output=out))
    uri = ParquetSink(run).publish(0, shard_rows(run, 0))
    codec = pq.ParquetFile(uri).metadata.row_group(0).column(0).compression
    assert codec == {"none": "UNCOMPRESSED"}.get(compression, compression.upper())


def test_a_failed_write_leaves_the_shard_pending(local_run, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="free some space"):
        ParquetSink(local_run).publish(0, shard_rows(local_run, 0))
    monkeypatch.undo()
    assert pending_shards(local_run) == [0, 1, 2]
    assert storage.temporaries(local_run.uri) == []


def test_a_truncated_part_is_named(local_run):
    uri = ParquetSink(local_run).publish(0, shard_rows(local_run, 0))
    data = storage.read(uri)
    storage.write_atomic(uri, data[:-30])
    with pytest.raises(StorageError, match=r"part-00000\.parquet cannot be read"):
        read_rows(uri)


def test_part_names_round_trip():
    for index in (0, 42, 99_999, 100_000, 1_234_567):
        assert part_index(part_name(index)) == index
    assert part_name(42) == "part-00042.parquet"
    for name in ("part-42.parquet", "part-000042.parquet", "part-00042.parquet.tmp", "x"):
        assert part_index(name) is None


def test_rows_are_typed_data_not_markup(local_run):
    rows = shard_rows(local_run, 0)
    rows[0] = dataclasses.replace(rows[0], text="<script>alert(1)</script>")
    uri = ParquetSink(local_run).publish(0, rows)
    assert (
        pq.read_table(io.BytesIO(storage.read(uri)), columns=["text"])["text"][0].as_py() == "<script>alert(1)</script>"
    )

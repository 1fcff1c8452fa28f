"""Verification: a sound run has no violation, and every kind of damage is seen and named."""

import dataclasses
import io
import json
import os
import random
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import complete, failed_row, make_config, put_media, shard_rows

from pipeline import storage
from pipeline.errors import RefusedError
from pipeline.manifest import freeze, manifest_bytes
from pipeline.recipe import digest_of
from pipeline.shards import open_run, read_run_file
from pipeline.sink import SCHEMA, ParquetSink, part_name, read_rows
from pipeline.status import render_status, run_status
from pipeline.verify import verify_run
from pipeline.verify_rows import STAGES, stages_fit_latency


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run of three shards: 4, 4 and 2 items, the last one failed."""
    folder = tmp_path_factory.mktemp("finished")
    put_media(str(folder / "in"), 10)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    reduction = {"steps": [{"stage": "vision_block", "layers": [1], "reducer": {"kind": "illava", "num_merged": 2}}]}
    sections = {"input": {"uri": str(folder / "in")}, "output": {"uri": str(folder / "out")}}
    run = open_run(make_config(folder / "model", reduction=reduction, **sections))
    complete(run)
    return run


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy to damage."""
    uri = str(tmp_path / "out")
    shutil.copytree(finished_run.uri, uri)
    output = finished_run.config.output.model_copy(update={"uri": uri})
    return dataclasses.replace(finished_run, uri=uri, config=finished_run.config.model_copy(update={"output": output}))


def part_path(run, index=0):
    return os.path.join(run.uri, "data", part_name(index))


def edit_json(name, **changes):
    def damage(run):
        path = os.path.join(run.uri, name)
        with open(path) as file:
            content = json.load(file)
        for key, value in changes.items():
            place, *inner = key.split("__")
            if inner:
                content[place][inner[0]] = value
            else:
                content[place] = value
        storage.write_atomic(path, json.dumps(content).encode())

    return damage


def edit_rows(change, index=0):
    """Write a part again with changed plain rows, everything else as it was."""

    def damage(run):
        table = pq.read_table(part_path(run, index))
        rows = change(table.to_pylist())
        schema = SCHEMA.with_metadata(table.schema.metadata)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), part_path(run, index))

    return damage


def set_value(index=0, row=0, **values):
    def change(rows):
        rows[row] |= values
        return rows

    return edit_rows(change, index)


def edit_metadata(**changes):
    def damage(run):
        table = pq.read_table(part_path(run))
        metadata = {**table.schema.metadata, **{f"illava.{k}".encode(): v.encode() for k, v in changes.items()}}
        pq.write_table(table.replace_schema_metadata(metadata), part_path(run))

    return damage


def on_file(index, action):
    return lambda run: action(part_path(run, index))


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 20)


def flip_a_byte(path, seed=0):
    """Somewhere in the rows; the footer is another matter."""
    with open(path, "r+b") as file:
        file.seek(-8, 2)
        end_of_rows = file.tell() - int.from_bytes(file.read(4), "little")
        file.seek(random.Random(seed).randrange(4, end_of_rows))
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))


def drop_column(path):
    pq.write_table(pq.read_table(path).drop_columns(["text"]), path)


def empty(path):
    with open(path, "wb"):
        pass


def another_runs_part(run):
    other = dataclasses.replace(run, fingerprint="f" * 32)
    rows = [dataclasses.replace(row, run_fingerprint="f" * 32) for row in shard_rows(run, 0)]
    object.__setattr__(other, "nonce", run.nonce)
    from pipeline.sink import _part_bytes

    storage.write_atomic(part_path(run), _part_bytes(rows, other.part_metadata(0), "zstd"))


def swap_parts(run):
    a, b = storage.read(part_path(run, 0)), storage.read(part_path(run, 1))
    storage.write_atomic(part_path(run, 0), b)
    storage.write_atomic(part_path(run, 1), a)


def shorten_manifest(run):
    table = run.manifest.table.slice(0, 9)
    data = manifest_bytes(freeze({name: table[name] for name in table.column_names}))
    storage.write_atomic(os.path.join(run.uri, f"manifest-{run.manifest.digest}.parquet"), data)


def touch(name):
    return lambda run: storage.write_atomic(os.path.join(run.uri, name), b"x")


def leave_temporary(run):
    with open(os.path.join(run.uri, "data", ".part-00000.parquet~host~1~00.tmp"), "wb"):
        pass


def late_writer_after_a_retry(run):
    """Shard 2 was made anew by attempt 2; then a writer of attempt 1 put its older part back."""
    edit_json("run.json", attempt=2, retried_shards={"2": [2]})(run)
    edit_json("_RUN.json", attempt=2)(run)


DAMAGES = {
    "run_file_gone": (lambda run: os.unlink(os.path.join(run.uri, "run.json")), "run_file"),
    "run_file_garbage": (touch("run.json"), "run_file"),
    "run_file_wrong_type": (edit_json("run.json", items_per_shard="4"), "run_file"),
    "recipe_edited": (edit_json("run.json", recipe__seed=7), "fingerprint"),
    "fingerprint_edited": (edit_json("run.json", fingerprint="0" * 32), "fingerprint"),
    "shard_size_edited": (edit_json("run.json", items_per_shard=5), "fingerprint"),
    "manifest_gone": (
        lambda run: os.unlink(os.path.join(run.uri, f"manifest-{run.manifest.digest}.parquet")),
        "manifest",
    ),
    "manifest_shortened": (shorten_manifest, "manifest"),
    "part_gone": (on_file(1, os.unlink), "missing_part"),
    "part_truncated": (on_file(0, truncate), "unreadable_part"),
    "part_empty": (on_file(0, empty), "unreadable_part"),
    "part_with_a_flipped_byte": (on_file(0, flip_a_byte), "unreadable_part"),
    "part_with_a_column_less": (on_file(0, drop_column), "wrong_schema"),
    "part_of_another_run": (another_runs_part, "foreign_part"),
    "parts_swapped": (swap_parts, "foreign_part"),
    "part_of_another_manifest": (edit_metadata(manifest_digest="0"), "foreign_part"),
    "part_of_another_schema_version": (edit_metadata(schema_version="0"), "foreign_part"),
    "part_of_a_later_attempt": (edit_metadata(attempt="2"), "stale_part"),
    "part_of_a_late_writer": (late_writer_after_a_retry, "stale_part"),
    "part_too_many": (touch("data/part-00003.parquet"), "foreign_object"),
    "object_between_the_parts": (touch("data/notes.txt"), "foreign_object"),
    "object_in_the_folder": (touch("notes.txt"), "foreign_object"),
    "temporary_file": (leave_temporary, "temporary_file"),
    "row_gone": (edit_rows(lambda rows: rows[1:]), "missing_row"),
    "row_doubled": (edit_rows(lambda rows: [*rows, rows[0]]), "duplicate_row"),
    "row_of_nobody": (set_value(item_id="nobody"), "foreign_row"),
    "rows_in_another_order": (edit_rows(lambda rows: rows[::-1]), "wrong_order"),
    "row_of_another_fingerprint": (set_value(run_fingerprint="0"), "foreign_value"),
    "row_of_another_recipe": (set_value(recipe_digest="0"), "foreign_value"),
    "row_of_another_plan": (set_value(plan_digest="0"), "foreign_value"),
    "row_of_another_model": (set_value(model_id="0"), "foreign_value"),
    "row_of_another_shard": (set_value(shard_index=2), "foreign_value"),
    "row_with_another_address": (set_value(uri="/other.mp4"), "differs_from_manifest"),
    "row_with_other_fields": (set_value(fields=[("a", "b")]), "differs_from_manifest"),
    "failure_without_a_type": (set_value(index=2, row=1, error_type=None), "bad_status"),
    "failure_of_an_unknown_type": (set_value(index=2, row=1, error_type="oops"), "bad_status"),
    "failure_without_a_message": (set_value(index=2, row=1, error_message=None), "bad_status"),
    "success_with_an_error": (set_value(error_type="not_found"), "bad_status"),
    "unknown_status": (set_value(status="done"), "bad_status"),
    "answer_without_a_reason": (set_value(finish_reason=None), "bad_status"),
    "partial_without_a_reason": (set_value(status="partial"), "bad_status"),
    "no_attempt": (set_value(attempts=0), "bad_status"),
    "more_kept_than_there_are": (set_value(num_vision_tokens_kept=1569, num_prompt_tokens=2000), "bad_counts"),
    "decoder_keeps_more": (set_value(num_decoder_tokens_kept=801), "bad_counts"),
    "negative_count": (set_value(num_patches=-1), "bad_counts"),
    "ratio_of_other_counts": (set_value(kept_ratio=0.9), "bad_counts"),
    "prompt_shorter_than_its_tokens": (set_value(num_prompt_tokens=100), "bad_counts"),
    "answer_without_tokens": (set_value(num_generated_tokens=0), "bad_counts"),
    "negative_seconds": (set_value(decode_s=-0.1), "bad_seconds"),
    "seconds_not_finite": (set_value(gpu_s=float("nan")), "bad_seconds"),
    "negative_cost": (set_value(cost_usd=-1.0), "bad_seconds"),
    "timestamps_too_few": (set_value(frame_timestamps_s=[0.0]), "bad_seconds"),
    "timestamps_backwards": (set_value(frame_timestamps_s=[1.0] * 7 + [0.0]), "bad_seconds"),
    "stages_do_not_sum": (edit_rows(lambda rows: [row | {"queue_s": 0.5} for row in rows]), "stage_seconds"),
    "not_finished": (lambda run: os.unlink(os.path.join(run.uri, "_RUN.json")), "unfinished"),
    "finished_file_garbage": (touch("_RUN.json"), "finished_file"),
    "finished_file_of_another_run": (edit_json("_RUN.json", fingerprint="0"), "finished_file"),
    "finished_file_with_fewer_items": (edit_json("_RUN.json", num_items=9), "finished_file"),
    "totals_edited": (edit_json("_RUN.json", totals__by_status={"ok": 10}), "wrong_totals"),
    "cost_edited_in_a_row": (set_value(cost_usd=0.5), "wrong_totals"),
    "failure_hidden": (
        set_value(
            index=2,
            row=1,
            status="ok",
            error_type=None,
            finish_reason="stop",
            num_frames=8,
            num_patches=8,
            num_generated_tokens=3,
            latency_s=0.4,
        ),
        "wrong_totals",
    ),
}


def test_a_sound_run_has_no_violation(run):
    assert verify_run(run.uri) == []


def test_a_sound_run_in_either_store_has_no_violation(model_folder, root):
    put_media(storage.join(root, "in"), 5)
    sections = {"input": {"uri": storage.join(root, "in")}, "output": {"uri": storage.join(root, "out")}}
    run = open_run(make_config(model_folder, **sections))
    complete(run, shards=[0])
    assert [violation.kind for violation in verify_run(run.uri)] == ["missing_part", "unfinished"]
    complete(run)
    assert verify_run(run.uri + "/") == []


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_seen_and_named(run, name):
    damage, kind = DAMAGES[name]
    damage(run)
    found = verify_run(run.uri)
    assert kind in {violation.kind for violation in found}, [str(violation) for violation in found]
    assert all(violation.where and violation.message for violation in found)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_byte_in_the_rows_is_seen_or_harmless(run, seed):
    before = read_rows(part_path(run))
    flip_a_byte(part_path(run), seed)
    kinds = {violation.kind for violation in verify_run(run.uri)}
    assert "unreadable_part" in kinds or read_rows(part_path(run)).equals(before)  # page headers hold unused bytes


def test_at_least_twenty_kinds_of_damage_are_told_apart():
    assert len({kind for _, kind in DAMAGES.values()}) >= 20


def test_every_kind_of_violation_has_its_damage():
    from pipeline import verify, verify_rows

    named = set()
    for module in (verify, verify_rows):
        with open(module.__file__) as file:
            text = file.read()
        named |= set(re.findall(r'(?:Violation\(\s*|^    \(|\(\()"([a-z_]+)"', text, re.MULTILINE))
        named |= set(re.findall(r'\("([a-z_]+_row)", ', text))
    named -= {"bad_pages"}  # of documents: tests/pipeline/test_documents.py
    assert named == {kind for _, kind in DAMAGES.values()}


def test_a_retry_noted_in_the_run_file_is_sound(run):
    edit_json("run.json", attempt=2, retried_shards={"2": [2]})(run)
    again = open_run(run.config)
    rows = shard_rows(again, 2)
    rows[1] = failed_row(again, 2, again.shard(2).items[1], "load_timeout")
    ParquetSink(again).publish(2, rows)
    os.unlink(os.path.join(run.uri, "_RUN.json"))
    complete(again)
    assert verify_run(run.uri) == []
    assert read_run_file(run.uri)["attempt"] == 2


def test_a_few_misfitting_latencies_are_tolerated_many_are_not(model_folder, tmp_path):
    put_media(str(tmp_path / "in"), 200)
    sections = {"input": {"uri": str(tmp_path / "in")}, "output": {"uri": str(tmp_path / "o"), "items_per_shard": 200}}
    run = open_run(make_config(model_folder, **sections))
    complete(run)
    set_value(row=0, latency_s=2.0)(run)
    assert verify_run(run.uri) == []
    edit_rows(lambda rows: [row | {"latency_s": 2.0} if n < 3 else row for n, row in enumerate(rows)])(run)
    assert [violation.kind for violation in verify_run(run.uri)] == ["stage_seconds"]


def test_one_misfit_of_a_small_run_may_be_the_machines_two_are_not(run):
    def misfit(count):
        return edit_rows(lambda rows: [row | {"latency_s": 2.0 if n < count else 1.0} for n, row in enumerate(rows)])

    misfit(1)(run)
    assert verify_run(run.uri) == []
    misfit(2)(run)
    assert [violation.kind for violation in verify_run(run.uri)] == ["stage_seconds"]


@pytest.mark.parametrize(
    ("latency_s", "off_s", "fits"), [(2, 0.039, 1), (2, 0.041, 0), (0.005, 0.009, 1), (0.1, 0.02, 0)]
)
def test_stages_may_miss_the_latency_by_two_percent_or_ten_milliseconds(latency_s, off_s, fits):
    for total_s in (latency_s + off_s, latency_s - off_s):
        row = dict.fromkeys(STAGES, 0.0) | {"decode_s": total_s, "latency_s": latency_s}
        assert stages_fit_latency(row) == bool(fits)


def test_a_run_of_other_content_but_consistent_digests_is_still_one_run(run):
    record = read_run_file(run.uri)
    assert record["fingerprint"] == digest_of([record["recipe_digest"], record["manifest_digest"], 4])
    assert record["recipe_digest"] == digest_of(record["recipe"])


def test_status_of_an_unfinished_and_a_finished_run(model_folder, root):
    put_media(storage.join(root, "in"), 10)
    sections = {"input": {"uri": storage.join(root, "in")}, "output": {"uri": storage.join(root, "out")}}
    run = open_run(make_config(model_folder, **sections))
    status = run_status(run.uri)
    assert (status.finished, status.num_shards_done, status.num_shards, status.totals.num_rows) == (False, 0, 3, 0)
    assert "none yet" in render_status(status)
    complete(run, shards=[0, 2])
    status = run_status(run.uri)
    assert (status.finished, status.num_shards_done) == (False, 2)
    assert status.totals.by_status == {"failed": 1, "ok": 5}
    assert "same command resumes" in render_status(status)
    complete(run)
    status = run_status(run.uri)
    assert status.finished
    assert status.totals.by_error_type == {"corrupt_media": 1}
    text = render_status(status)
    assert "3 of 3" in text
    assert "1 corrupt_media" in text
    assert "51.0%" in text


def test_a_prompt_may_be_worded_by_its_task_but_not_be_another(model_folder, tmp_path):
    (tmp_path / "m.csv").write_text("uri,question\na.mp4,Who sings?\nb.mp4,Who cooks?\n")
    sections = {"input": {"manifest": str(tmp_path / "m.csv")}, "output": {"uri": str(tmp_path / "out")}}
    run = open_run(make_config(model_folder, **sections))
    complete(run)
    set_value(prompt="Who sings?\nAnswer briefly.")(run)
    assert verify_run(run.uri) == []
    set_value(prompt="Who cooks?\nAnswer briefly.")(run)
    assert [violation.kind for violation in verify_run(run.uri)] == ["differs_from_manifest"]


def test_status_of_no_run_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="holds no run"):
        run_status(str(tmp_path))


def test_a_part_read_back_is_the_part_written(run):
    assert pq.read_table(io.BytesIO(storage.read(part_path(run)))).num_rows == 4

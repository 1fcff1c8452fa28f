"""Tests verification: a sound run has no violation, and every kind of damage is seen and named."""

import dataclasses
import io
import os
import re
import shutil

import pyarrow.parquet as pq
import pytest

from pipeline.inspection.verify import verify_run
from pipeline.inspection.verify_rows import STAGES, stages_fit_latency
from pipeline.runs.config_fingerprint import digest_of
from pipeline.runs.parquet_sink import ParquetSink, read_rows
from pipeline.runs.run import open_run
from pipeline.runs.run_record import read_run_file
from pipeline.storage import storage
from tests.support.runs.damaged_runs import DAMAGES, edit_json, edit_rows, flip_a_byte, part_path, set_value
from tests.support.runs.run_folders import complete, failed_row, make_config, put_media, shard_rows


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run of three shards: 4, 4 and 2 items, the last one failed."""
    folder = tmp_path_factory.mktemp("finished")
    put_media(str(folder / "in"), 10)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "qwen2_vl"}')
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
    from pipeline.inspection import verify, verify_rows

    named = set()
    for module in (verify, verify_rows):
        with open(module.__file__) as file:
            text = file.read()
        named |= set(re.findall(r'(?:Violation\(\s*|^    \(|\(\()"([a-z_]+)"', text, re.MULTILINE))
        named |= set(re.findall(r'\("([a-z_]+_row)", ', text))
    named -= {"bad_pages"}  # of documents: tests/pipeline/tasks/test_document.py
    named -= {"unfinished_erasure"}  # tests/pipeline/runs/test_erase.py
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


def test_a_prompt_may_be_worded_by_its_task_but_not_be_another(model_folder, tmp_path):
    (tmp_path / "m.csv").write_text("uri,question\na.mp4,Who sings?\nb.mp4,Who cooks?\n")
    sections = {"input": {"manifest": str(tmp_path / "m.csv")}, "output": {"uri": str(tmp_path / "out")}}
    run = open_run(make_config(model_folder, **sections))
    complete(run)
    set_value(prompt="Who sings?\nAnswer briefly.")(run)
    assert verify_run(run.uri) == []
    set_value(prompt="Who cooks?\nAnswer briefly.")(run)
    assert [violation.kind for violation in verify_run(run.uri)] == ["differs_from_manifest"]


def test_a_part_read_back_is_the_part_written(run):
    assert pq.read_table(io.BytesIO(storage.read(part_path(run)))).num_rows == 4

"""Tests `retry`: only failed rows are computed again, only their parts change, and an interrupted retry is resumed."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.__main__ import main
from pipeline.errors import ConfigError, RefusedError
from pipeline.execution.runner import continue_run, run_job
from pipeline.faults import injected
from pipeline.inspection.status import run_status
from pipeline.runs.parquet_sink import ParquetSink, list_parts, part_attempts, read_parts, result_rows
from pipeline.runs.retry import begin_retry
from pipeline.runs.run import open_run
from pipeline.runs.run_record import read_run_file
from pipeline.storage import storage
from tests.support.media import clips
from tests.support.runs import fakes
from tests.support.runs.fakes import fixed, job_config, numbered_items, read_rows, violations

BROKEN = {"item-2": "store_error", "item-13": "corrupt_media", "item-17": "store_error"}  # shards 0, 1 and 2 of 4


class KilledError(BaseException):
    """Stands for the end of the process."""


def run(config, failing=BROKEN):
    loader = partial(fakes.fake_loader, failing=failing)
    return run_job(config, worker_factory=fakes.barcode_worker, loader_factory=loader)


def retry(uri, *, failing=None, **options):
    """The command; says also which items were loaded."""
    loaded = []

    class Watching(fakes.FakeLoader):
        def load(self, item):
            loaded.append(item.item_id)
            return super().load(item)

    opened = begin_retry(str(uri), **options)
    summary = continue_run(
        opened, worker_factory=fakes.barcode_worker, loader_factory=lambda *_: Watching(failing=failing)
    )
    return summary, sorted(loaded)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two finished runs over the same items: ``out`` has three failed rows, ``whole`` none."""
    folder = tmp_path_factory.mktemp("made")
    source = numbered_items(folder, 30)
    assert run(job_config(folder / "out", source)).exit_code == 3
    assert run(job_config(folder / "whole", source), failing={}).exit_code == 0
    return folder


@pytest.fixture
def config(made, tmp_path):
    """The job, on a copy of its folder."""
    shutil.copytree(made / "out", tmp_path / "out")
    return job_config(tmp_path / "out", {"manifest": str(made / "items.jsonl")})


@pytest.fixture
def finished(config):
    """The folder of a run with three failed rows."""
    return Path(config.output.uri)


@pytest.fixture(scope="module")
def whole_rows(made):
    """What a run without faults gives, free columns aside."""
    return list(map(fixed, read_rows(made / "whole")))


def part_bytes(folder):
    return {part.name: part.read_bytes() for part in folder.glob("data/*")}


def test_only_failed_rows_are_computed_and_all_others_stay_as_they_are_free_columns_included(finished, whole_rows):
    before, parts = read_rows(finished), part_bytes(finished)
    summary, loaded = retry(finished)
    assert loaded == ["item-13", "item-17", "item-2"]
    assert (summary.exit_code, summary.stats.num_rows, summary.num_done_before) == (0, 3, 27)
    after = read_rows(finished)
    assert list(map(fixed, after)) == whole_rows
    changed = [new["item_id"] for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["item-2", "item-13", "item-17"]
    untouched = "part-00003.parquet"
    assert part_bytes(finished)[untouched] == parts[untouched]
    assert part_attempts(str(finished), range(4)) == [2, 2, 2, 1]
    assert violations(finished) == []
    record = read_run_file(str(finished))
    assert (record["attempt"], record["retried_shards"]) == (2, {"2": [0, 1, 2]})
    assert json.loads((finished / "_RUN.json").read_text())["attempt"] == 2


def test_only_takes_error_types_and_what_fails_again_is_a_failed_row_again(finished):
    summary, loaded = retry(finished, only=["store_error"], failing={"item-17": "load_timeout"})
    assert (summary.exit_code, loaded) == (3, ["item-17", "item-2"])
    failed = {row["item_id"]: row["error_type"] for row in read_rows(finished) if row["status"] == "failed"}
    assert failed == {"item-13": "corrupt_media", "item-17": "load_timeout"}
    assert part_attempts(str(finished), range(4)) == [2, 1, 2, 1]
    summary, loaded = retry(finished)
    assert (summary.exit_code, loaded) == (0, ["item-13", "item-17"])
    assert part_attempts(str(finished), range(4)) == [2, 3, 3, 1]
    assert violations(finished) == []


def test_an_ordinary_run_is_published_without_what_a_retry_needs(tmp_path, monkeypatch):
    """To see this fail: publish through `RetrySink` always, as it was."""
    monkeypatch.setattr("pipeline.execution.runner.RetrySink", lambda run: pytest.fail("a retry's sink"))
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 9))
    assert run(config).exit_code == 3
    with pytest.raises(pytest.fail.Exception, match="a retry's sink"):
        retry(tmp_path / "out")


def test_where_nothing_failed_nothing_is_touched(tmp_path):
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 30))
    run(config, failing={})
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    summary, loaded = retry(tmp_path / "out")
    assert (summary.exit_code, loaded) == (0, [])
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


def test_a_type_that_no_row_failed_with_changes_nothing_and_the_exit_code_still_says_failed(finished):
    parts = part_bytes(finished)
    summary, loaded = retry(finished, only=["worker_died"])
    assert (summary.exit_code, loaded, part_bytes(finished)) == (3, [], parts)


@pytest.mark.parametrize(
    ("survived", "again"), [*((n, "retry") for n in range(12)), (2, "job"), (5, "job"), (9, "job")]
)
def test_killed_at_any_write_then_either_command_again_ends_the_retry(finished, config, whole_rows, survived, again):
    left = [survived]

    def die(name, subject):
        left[0] -= name == "write"
        if left[0] < 0:
            raise KilledError

    with pytest.raises(KilledError), injected(die):
        retry(finished)
    retried = read_run_file(str(finished))["attempt"] == 2
    assert any(found.startswith("unfinished") for found in violations(finished)) == (survived >= 3)
    summary, loaded = retry(finished) if again == "retry" else (run(config, failing={}), [])
    if again == "job" and not retried:
        assert summary.exit_code == 3, "the retry had not begun"
        summary, loaded = retry(finished)
    assert summary.exit_code == 0
    assert set(loaded) <= BROKEN.keys(), "never a row that was good"
    assert list(map(fixed, read_rows(finished))) == whole_rows
    assert violations(finished) == []
    assert read_run_file(str(finished))["attempt"] == 2


def test_an_interrupted_retry_keeps_the_error_types_it_began_with(tmp_path):
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 10))
    run(config, failing={"item-2": "store_error", "item-3": "corrupt_media"})

    def die(name, subject):
        if name == "publish_before":
            raise KilledError

    with pytest.raises(KilledError), injected(die):
        retry(tmp_path / "out", only=["store_error"])
    assert run_status(str(tmp_path / "out")).num_shards_done == 1, "of two, though both parts stand"
    summary, loaded = retry(tmp_path / "out")
    assert (summary.exit_code, loaded) == (3, ["item-2"]), "item-3 was not asked for"
    assert violations(tmp_path / "out") == []


def test_a_late_writer_of_the_older_attempt_is_refused_and_a_part_it_wrote_is_seen_and_repaired(finished, config):
    late = open_run(config)
    old_parts = part_bytes(finished)
    retry(finished)
    rows = result_rows(next(read_parts(str(finished), [0])))
    with pytest.raises(RefusedError, match="another job took the folder over"):
        ParquetSink(late).publish(0, rows)
    (finished / "data" / "part-00000.parquet").write_bytes(old_parts["part-00000.parquet"])
    assert any(found.startswith("stale_part: data/part-00000.parquet") for found in violations(finished))
    summary, loaded = retry(finished)
    assert (summary.exit_code, loaded) == (0, ["item-2"])
    assert violations(finished) == []


def test_a_late_part_without_a_failed_row_is_published_again_without_computing_anything(finished):
    retry(finished)
    path = finished / "data" / "part-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"illava.attempt": b"1"}), path)
    assert any(found.startswith("stale_part") for found in violations(finished))
    summary, loaded = retry(finished)
    assert (summary.exit_code, loaded) == (0, [])
    assert violations(finished) == []


def test_the_input_may_have_gone_or_grown_since(finished, made):
    manifest = made / "items.jsonl"
    content = manifest.read_text()
    manifest.write_text('{"id": "item-99", "uri": "99.mp4"}')
    try:
        summary, _ = retry(finished)
    finally:
        manifest.write_text(content)
    assert summary.exit_code == 0
    assert len(read_rows(finished)) == 30


@pytest.mark.parametrize(
    ("override", "error", "named"),
    [
        ("sampling.max_new_tokens=5", RefusedError, r"sampling\.max_new_tokens"),
        ("task.prompt=Else", RefusedError, r"task\.prompt"),
        ("reduction.preset=illava-video", RefusedError, "reduction"),
        ("input.limit=3", ConfigError, r"input\.limit"),
        ("output.uri=/elsewhere", ConfigError, r"output\.uri"),
        ("output.items_per_shard=4", ConfigError, "items_per_shard"),
        ("media.num_frame=3", ConfigError, "did you mean media.num_frames"),
    ],
)
def test_no_override_changes_the_fingerprint_or_the_items(finished, override, error, named):
    before = {path: path.read_bytes() for path in finished.rglob("*.*")}
    with pytest.raises(error, match=named):
        begin_retry(str(finished), overrides=[override])
    assert {path: path.read_bytes() for path in finished.rglob("*.*")} == before


def test_overrides_of_execution_hold_for_the_retry(finished):
    opened = begin_retry(
        str(finished), overrides=["runtime.max_attempts=7", "media.load_timeout_s=600", "input.follow_links=/hub"]
    )
    assert (opened.config.runtime.max_attempts, opened.config.media.load_timeout_s) == (7, 600)
    assert opened.config.input.follow_links == "/hub"


def test_a_run_with_missing_parts_is_finished_first(finished):
    (finished / "data" / "part-00003.parquet").unlink()
    with pytest.raises(RefusedError, match="1 of 4 parts are missing; finish the run first"):
        begin_retry(str(finished))
    assert (finished / "_RUN.json").exists()


def test_on_s3(s3_bucket, tmp_path):
    uri = f"{s3_bucket}/out"
    run(job_config(uri, numbered_items(tmp_path, 30)))
    summary, loaded = retry(uri)
    assert (summary.exit_code, loaded) == (0, ["item-13", "item-17", "item-2"])
    assert violations(uri) == []
    assert part_attempts(uri, list_parts(uri)) == [2, 2, 2, 1]


def test_the_command_on_the_bundled_model_with_its_exit_codes(tmp_path, capsys):
    media = tmp_path / "media"
    media.mkdir()
    clips.write_barcode_video(media / "good.mp4", 1)
    manifest = tmp_path / "items.jsonl"
    manifest.write_text('{"id": "a", "uri": "good.mp4"}\n{"id": "b", "uri": "late.mp4"}')
    source = {"uri": str(media), "manifest": str(manifest)}
    config = job_config(tmp_path / "out", source, sampling={"max_new_tokens": 4})
    assert run_job(config).exit_code == 3
    uri = str(tmp_path / "out")
    assert main(["retry", uri]) == 3, "the file is still not there"
    clips.write_barcode_video(media / "late.mp4", 2)
    assert main(["retry", uri, "--only", "nonsense"]) == 2
    assert main(["retry", uri, "--set", "seed=3"]) == 4
    assert main(["retry", str(tmp_path / "nowhere")]) == 4
    capsys.readouterr()
    assert main(["retry", uri, "--only", "not_found", "--set", "runtime.max_attempts=1"]) == 0
    assert "1 of 2 items" in capsys.readouterr().out
    assert main(["retry", uri]) == 0
    assert "nothing to do, all 2 items have their rows" in capsys.readouterr().out
    assert main(["verify", uri]) == 0
    assert storage.exists(storage.join(uri, "_RUN.json"))

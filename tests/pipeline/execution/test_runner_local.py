"""Tests whole runs in one process: real inputs, storage, decoders and sink; a model that reads barcodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import boto3
import pytest

from pipeline.errors import CredentialsError, RefusedError
from pipeline.execution.reporting.summary import render_summary
from pipeline.execution.runner import run_job
from tests.support.media import clips
from tests.support.runs import fakes
from tests.support.runs.fakes import fixed, job_config, numbered_items, read_rows, violations
from tests.support.timing import holds_in_one_of_three

ROOT = Path(__file__).resolve().parents[3]


def run(config, **options):
    loader_factory = partial(fakes.fake_loader, **options.pop("loader", {}))
    return run_job(config, worker_factory=partial(fakes.barcode_worker, **options), loader_factory=loader_factory)


def answers(output) -> dict[str, str]:
    return {row["item_id"]: row["text"] for row in read_rows(output)}


def test_every_item_once_and_the_same_command_again_recomputes_nothing(tmp_path) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 21))
    first = run(config)
    assert first.exit_code == 0
    assert answers(tmp_path / "out") == {f"item-{n}": str(n) for n in range(21)}
    assert violations(tmp_path / "out") == []
    parts = {part: part.stat().st_mtime_ns for part in Path(tmp_path, "out", "data").iterdir()}

    def no_worker(config, run_info):
        raise AssertionError("a finished run needs no model")

    again = run_job(config, worker_factory=no_worker)
    assert (again.exit_code, again.stats.num_rows, again.num_done_before) == (0, 0, 21)
    assert "nothing to do, all 21 items have their rows" in render_summary(again)
    assert parts == {part: part.stat().st_mtime_ns for part in Path(tmp_path, "out", "data").iterdir()}


def test_failed_items_are_rows_and_the_exit_code_says_so_now_and_on_the_next_call(tmp_path) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 10))
    summary = run(config, broken="4", loader={"failing": {"item-2": "corrupt_media"}})
    assert summary.exit_code == 3
    failed = {row["item_id"]: row["error_type"] for row in read_rows(tmp_path / "out") if row["status"] == "failed"}
    assert failed == {"item-2": "corrupt_media", "item-4": "internal_error"}
    assert violations(tmp_path / "out") == []
    text = render_summary(summary)
    assert "8 ok, 0 partial, 2 failed" in text
    assert "1 corrupt_media" in text
    assert run(config).exit_code == 3


def test_a_retryable_failure_is_tried_max_attempts_times(tmp_path) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 3), runtime={"max_attempts": 3})
    run(config, loader={"failing": {"item-1": "store_error"}, "retryable": True})
    [row] = [row for row in read_rows(tmp_path / "out") if row["status"] == "failed"]
    assert (row["item_id"], row["attempts"]) == ("item-1", 3)


def test_limit_takes_the_first_items(tmp_path) -> None:
    source = numbered_items(tmp_path, 9) | {"limit": 4}
    run(job_config(tmp_path / "out", source))
    assert sorted(answers(tmp_path / "out")) == ["item-0", "item-1", "item-2", "item-3"]


def test_another_configuration_on_the_same_output_is_refused_by_key(tmp_path) -> None:
    source = numbered_items(tmp_path, 3)
    run(job_config(tmp_path / "out", source))
    with pytest.raises(RefusedError, match=r"sampling\.max_new_tokens"):
        run(job_config(tmp_path / "out", source, sampling={"max_new_tokens": 5}))
    again = job_config(tmp_path / "out", source, runtime={"max_inflight_bytes": 1_000_000}, prices={"cpu_hour_usd": 1})
    assert run(again).exit_code == 0, "what changes no row resumes"


@pytest.mark.parametrize("stage", ["load_s", "decode_s"])
def test_a_known_sleep_appears_in_its_stage_only_and_stages_sum_to_the_latency(tmp_path, stage) -> None:
    where = {"loader": {"sleeps": {stage: 0.3}}} if stage == "load_s" else {"sleeps": {stage: 0.3}}

    @holds_in_one_of_three
    def attempt(number) -> None:
        out = tmp_path / f"out-{number}"
        run(job_config(out, numbered_items(tmp_path, 3), model={"max_batch_requests": 1}), **where)
        for row in read_rows(out):
            seconds = {n: row[n] for n in ("fetch_s", "load_s", "preprocess_s", "vision_s", "prefill_s", "decode_s")}
            assert 0.3 <= seconds.pop(stage) < 0.45
            assert max(seconds.values()) < 0.15
            total = row[stage] + row["queue_s"] + sum(seconds.values())
            assert total == pytest.approx(row["latency_s"], rel=0.02)


def test_adversarial_files_are_rows_with_named_errors_and_neighbours_are_unharmed(tmp_path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for value in (101, 102):
        clips.write_barcode_video(media / f"good{value}.mp4", value)
    clips.write_barcode_video(media / "modern.mp4", 103, codec="libsvtav1", options={"preset": "10", "crf": "10"})
    (media / "empty.mp4").touch()
    (media / "corrupt.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom" + bytes(range(256)) * 40)
    clips.write_audio_only(media / "sound.mp4")
    clips.write_truncated(media / "headless.mp4", media / "good101.mp4", keep_ratio=0.3)
    whole = clips.write_barcode_video(tmp_path / "w.mp4", 104, container_options={"movflags": "faststart"})
    clips.write_truncated(media / "torn.mp4", whole, keep_ratio=0.8)
    config = job_config(tmp_path / "out", {"uri": str(media), "pattern": "*.mp4"})
    summary = run_job(config, worker_factory=fakes.barcode_worker)
    rows = {Path(row["uri"]).name: row for row in read_rows(tmp_path / "out")}
    assert summary.exit_code == 3
    assert [rows[f"good{n}.mp4"]["text"] for n in (101, 102)] == ["101", "102"]
    assert (rows["modern.mp4"]["text"], rows["modern.mp4"]["decoder"]) == ("103", "pyav")
    assert (rows["torn.mp4"]["text"], rows["torn.mp4"]["status"]) == ("104", "partial")
    named = {name: row["error_type"] for name, row in rows.items() if row["status"] == "failed"}
    assert named == {
        "empty.mp4": "empty_media",
        "corrupt.mp4": "corrupt_media",
        "sound.mp4": "no_video_stream",
        "headless.mp4": "corrupt_media",
    }
    assert all(rows[name]["error_message"] for name in named)
    assert violations(tmp_path / "out") == []


def _start(tmp_path: Path, output: Path, source: dict) -> subprocess.Popen:
    """The same job in a process of its own, which is in the middle until the file "caught" exists."""
    code = (
        "import sys; from functools import partial\n"
        "from pipeline.execution.runner import run_job\n"
        "from tests.support.models.gated_model import gated_worker; from tests.support.runs import fakes\n"
        f"config = fakes.job_config({str(output)!r}, {source!r})\n"
        f"gates = {{40: {str(tmp_path / 'caught')!r}}}\n"
        "work = partial(gated_worker, gates=gates, sleeps={'decode_s': 0.03})\n"
        "sys.exit(run_job(config, worker_factory=work, loader_factory=fakes.fake_loader).exit_code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "ab") as log:
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=log, stderr=log)


def _wait_for_parts(output: Path, count: int, process: subprocess.Popen) -> None:
    deadline_s = time.monotonic() + 240
    while len(list(output.glob("data/*.parquet"))) < count:
        assert process.poll() is None, "the job ended before it could be caught"
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_killed_in_the_middle_then_the_same_command_gives_every_item_exactly_once(tmp_path) -> None:
    output, source = tmp_path / "out", numbered_items(tmp_path, 60)
    process = _start(tmp_path, output, source)
    _wait_for_parts(output, 2, process)
    process.kill()
    assert process.wait(timeout=240) == -signal.SIGKILL
    done = {part: part.stat().st_mtime_ns for part in output.glob("data/*.parquet")}
    assert 2 <= len(done) < 8
    summary = run(job_config(output, source))
    assert summary.exit_code == 0
    assert summary.num_done_before == 8 * len(done)
    assert {part: part.stat().st_mtime_ns for part in done} == done, "published parts are not touched"
    assert len(read_rows(output)) == 60
    assert answers(output) == {f"item-{n}": str(n) for n in range(60)}
    assert violations(output) == []
    whole = tmp_path / "whole"
    run(job_config(whole, source))
    assert list(map(fixed, read_rows(output))) == list(map(fixed, read_rows(whole))), "as if nothing had happened"


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_publishes_complete_shards_and_leaves_a_resumable_run(tmp_path, number, exit_code) -> None:
    output, source = tmp_path / "out", numbered_items(tmp_path, 60)
    process = _start(tmp_path, output, source)
    _wait_for_parts(output, 1, process)
    process.send_signal(number)
    (tmp_path / "caught").touch()
    assert process.wait(timeout=240) == exit_code, (tmp_path / "log").read_text()
    assert not (output / "_RUN.json").exists()
    assert not list(output.glob("**/*tmp*"))
    assert run(job_config(output, source)).exit_code == 0
    assert answers(output) == {f"item-{n}": str(n) for n in range(60)}


def test_s3_in_and_out_gives_the_same_rows_as_the_local_folder(tmp_path, s3_bucket, s3_environment) -> None:
    media = tmp_path / "media"
    media.mkdir()
    client = boto3.client("s3", endpoint_url=s3_environment["AWS_ENDPOINT_URL"])
    lines = []
    for value in range(201, 209):
        path = clips.write_barcode_video(media / f"{value}.mp4", value)
        client.upload_file(str(path), s3_bucket.removeprefix("s3://"), f"media/{value}.mp4")
        lines.append(f'{{"id": "clip-{value}", "uri": "{value}.mp4"}}')
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    client.upload_file(str(tmp_path / "items.jsonl"), s3_bucket.removeprefix("s3://"), "items.jsonl")
    rows = {}
    for place, base, manifest in (
        ("local", str(media), str(tmp_path / "items.jsonl")),
        ("s3", f"{s3_bucket}/media", f"{s3_bucket}/items.jsonl"),
    ):
        output = str(tmp_path / "out") if place == "local" else f"{s3_bucket}/out"
        config = job_config(output, {"uri": base, "manifest": manifest}, media={"num_frames": 3})
        assert run_job(config, worker_factory=fakes.barcode_worker).exit_code == 0
        assert violations(output) == []
        rows[place] = _stored_rows(output)
    assert [row["text"] for row in rows["s3"]] == [str(value) for value in range(201, 209)]
    assert all(row["bytes_fetched"] > 0 for row in rows["s3"])
    elsewhere = {"uri", "uris", "media_etag", "run_fingerprint"}
    for local, remote in zip(rows["local"], rows["s3"], strict=True):
        differ = {name for name in fixed(local) if local[name] != remote[name]}
        assert differ <= elsewhere


def _stored_rows(output: str) -> list[dict]:
    from pipeline.runs.parquet_sink import list_parts, read_parts

    return [row for table in read_parts(output, list_parts(output)) for row in table.to_pylist()]


def test_expired_credentials_stop_the_run_instead_of_failing_its_items(tmp_path) -> None:
    class Expiring(fakes.FakeLoader):
        def load(self, item):
            if item.item_id == "item-22":
                raise CredentialsError("the token expired; renew it and run the same command again")
            return super().load(item)

    config = job_config(tmp_path / "out", numbered_items(tmp_path, 24))
    with pytest.raises(CredentialsError, match="renew it"):
        run_job(config, worker_factory=fakes.barcode_worker, loader_factory=lambda *_: Expiring())
    rows = read_rows(tmp_path / "out")
    assert rows, "complete shards were published before"
    assert all(row["status"] == "ok" for row in rows)
    assert run(config).exit_code == 0

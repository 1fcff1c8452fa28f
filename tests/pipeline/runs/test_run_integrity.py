"""Tests whole runs: nothing of another run passes for done, sums hold, messages help, no secret leaks."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import boto3
import pytest
import yaml

from pipeline.__main__ import main as pipeline_main
from pipeline.cli import run_cli
from pipeline.config.schema import JobConfig
from pipeline.errors import InputError, ItemError, RefusedError
from pipeline.execution.ray.executor import RayExecutor
from pipeline.execution.reporting.summary import RunStats, render_summary
from pipeline.execution.rows import RowMaker, RunInfo
from pipeline.execution.runner import run_job
from pipeline.execution.worker import VLMWorker, WorkerUsage
from pipeline.records import MediaItem, ResultRow
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.storage import storage
from tests.support.media import clips
from tests.support.runs import fakes
from tests.support.runs.actors_without_ray import Cluster, idle_scheduler
from tests.support.runs.fakes import fixed, job_config, numbered_items, violations

ROOT = Path(__file__).resolve().parents[3]


def run(config, **options):
    loader_factory = partial(fakes.fake_loader, **options.pop("loader", {}))
    return run_job(config, worker_factory=partial(fakes.barcode_worker, **options), loader_factory=loader_factory)


# --- resuming and refusing


def test_parts_without_a_run_file_are_not_taken_for_this_runs_own(tmp_path) -> None:
    run(job_config(tmp_path / "out", numbered_items(tmp_path, 9)))
    (tmp_path / "out" / "run.json").unlink()
    another = job_config(tmp_path / "out", numbered_items(tmp_path, 9), sampling={"max_new_tokens": 5})
    with pytest.raises(RefusedError, match=r"2 parts in data/ and no run\.json.*new output\.uri"):
        run(another)


def test_a_part_taken_away_after_the_end_is_made_again_and_the_run_verifies(tmp_path) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 20))
    run(config)
    (tmp_path / "out" / "data" / "part-00001.parquet").unlink()
    assert run(config).num_done_before == 12
    assert violations(tmp_path / "out") == []


def test_a_finished_run_is_unfinished_while_a_part_of_it_is_made_again(tmp_path) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 20))
    run(config)
    (tmp_path / "out" / "data" / "part-00001.parquet").unlink()
    with pytest.raises(InputError, match="stop here"):
        run_job(config, worker_factory=partial(fakes.raising_factory, error=InputError, message="stop here"))
    assert not (tmp_path / "out" / "_RUN.json").exists()


def test_a_driver_that_ends_second_leaves_sums_that_hold(tmp_path) -> None:
    """The other one finished the run before this one published its copy of a shard."""
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 9))

    def late_worker(config, run_info):
        run(config)  # the other driver, from its begin to its end
        return fakes.barcode_worker(config, run_info, sleeps={"decode_s": 0.01})

    run_job(config, worker_factory=late_worker, loader_factory=fakes.fake_loader)
    assert violations(tmp_path / "out") == []


# --- messages


def fake_row(folder: Path) -> ResultRow:
    config = job_config(folder / "row", {"uri": "unused"})
    item = MediaItem("id", ("s3://bucket/x.mp4",), "video", (-1,), ("",))
    return RowMaker(config, RunInfo("", "")).failed(item, "not_found", "gone", attempts=1, shard_index=0)


def test_an_interrupted_run_counts_what_is_not_published(tmp_path) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 20), model={"max_batch_requests": 1})

    def signalling(config, run_info):
        worker = fakes.barcode_worker(config, run_info)
        step, worker.made = worker.step, 0

        def stepped():
            worker.made += (outcomes := step()) != []
            if worker.made == 11:  # one shard and three rows of the next
                signal.raise_signal(signal.SIGTERM)
            return outcomes

        worker.step = stepped
        return worker

    summary = run_job(config, worker_factory=signalling, loader_factory=fakes.fake_loader)
    assert summary.exit_code == 143
    assert "interrupted by SIGTERM; complete shards are published, 12 of 20 items are left" in render_summary(summary)
    assert list_parts(str(tmp_path / "out")) == [0]


def test_the_summary_says_what_was_written_and_that_no_prices_are_set(tmp_path) -> None:
    said = render_summary(run(job_config(tmp_path / "free", numbered_items(tmp_path, 3))))
    assert "no prices set" in said
    assert "$" not in said
    assert "0.mp4: 0" in said, "one caption, with its file's name"
    priced = job_config(tmp_path / "paid", numbered_items(tmp_path, 3), prices={"cpu_hour_usd": 3600.0})
    said = render_summary(run(priced, sleeps={"decode_s": 0.01}))
    assert "no prices set" not in said
    assert "an item; " in said


@pytest.mark.parametrize(
    ("texts", "shown"), [(["\n\n", "a\n cat\x1b"], "b.mp4: a cat\\x1b"), (["\n"], "(nothing but white space)")]
)
def test_the_example_is_one_printable_line(tmp_path, texts, shown) -> None:
    summary = run(job_config(tmp_path / "out", numbered_items(tmp_path, 1)))
    stats = RunStats()
    for name, text in zip("ab", texts, strict=False):
        stats.add(replace(fake_row(tmp_path), uri=f"s3://bucket/{name}.mp4", text=text))
    [line] = [
        line for line in render_summary(replace(summary, stats=stats)).splitlines() if line.startswith("  example")
    ]
    assert line.endswith(shown)


@pytest.mark.parametrize("uri", ["s3://user:pass-word@bucket/x/", "https://host/x.mp4?X-Amz-Signature=pass-word"])
@pytest.mark.parametrize("key", ["input.uri", "input.manifest", "output.uri"])
def test_an_address_with_a_secret_is_refused_without_repeating_it(tmp_path, capsys, uri, key) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_config(tmp_path / "out", {"uri": str(tmp_path)}).model_dump(mode="json")))
    assert run_cli("job", ["--config", str(path), "--set", f"{key}={uri}"]) == 2
    said = capsys.readouterr().err
    assert "refused address" in said
    assert "pass-word" not in said
    manifest = tmp_path / "items.jsonl"
    manifest.write_text(json.dumps({"uri": uri}))
    with pytest.raises((InputError, ItemError)) as caught:
        run(job_config(tmp_path / "out", {"manifest": str(manifest)}))
    assert "pass-word" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_manifest_that_is_not_there_is_a_wrong_configuration(tmp_path) -> None:
    with pytest.raises(InputError, match=r"input\.manifest: there is no .*nothing\.jsonl; check the address"):
        run(job_config(tmp_path / "out", {"manifest": str(tmp_path / "nothing.jsonl")}))


def test_help_lists_the_commands_and_each_has_its_own(capsys) -> None:
    with pytest.raises(SystemExit):
        pipeline_main(["--help"])
    listed = capsys.readouterr().out
    for command in ("verify", "status", "compare", "convert", "export-for-judge"):
        assert f"\n    {command}" in listed
        with pytest.raises(SystemExit) as ended:
            pipeline_main([command, "--help"])
        assert ended.value.code == 0


# --- docs and configs


def _leaves(section, prefix=""):
    for name, value in section.items():
        if isinstance(value, dict) and name != "reduction":
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_stands_in_the_config_that_docs_name() -> None:
    data = yaml.safe_load((ROOT / "configs" / "caption_videos_llava_onevision.yaml").read_text())
    keys = set(_leaves(JobConfig.model_validate(data).model_dump()))
    assert keys - set(_leaves(data)) == set()


# --- on Ray


@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("worker", [fakes.barcode_worker, pytest.param(VLMWorker, marks=pytest.mark.long)])
def test_s3_in_and_out_on_ray_gives_the_rows_of_a_local_run(
    tmp_path, s3_bucket, s3_environment, monkeypatch, worker
) -> None:
    """The long one with the demo's model; actors have the credentials from the environment alone."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = boto3.client("s3", endpoint_url=s3_environment["AWS_ENDPOINT_URL"])
    lines = []
    for value in (301, 302):
        clip = clips.write_barcode_video(tmp_path / f"{value}.mp4", value)
        client.upload_file(str(clip), s3_bucket.removeprefix("s3://"), f"media/{clip.name}")
        lines.append(json.dumps({"id": clip.stem, "uri": clip.name}))
    manifest = tmp_path / "items.jsonl"
    manifest.write_text("\n".join(lines))
    rows = {}
    for executor, base, output in (
        ("local", str(tmp_path), str(tmp_path / "out")),
        ("ray", f"{s3_bucket}/media", f"{s3_bucket}/out"),
    ):
        storage.write_atomic(f"{base}/items.jsonl", manifest.read_bytes())
        config = job_config(
            output,
            {"uri": base, "manifest": f"{base}/items.jsonl"},
            executor=executor,
            model={"max_batch_requests": 1},
            sampling={"max_new_tokens": 4},
            reduction={"preset": "illava-small-video"},
            runtime={"num_reader_actors": 1},
        )
        assert run_job(config, worker_factory=worker).exit_code == 0
        assert violations(output) == []
        rows[executor] = [row for table in read_parts(output, list_parts(output)) for row in table.to_pylist()]
    elsewhere = {"uri", "uris", "run_fingerprint"}
    for local, remote in zip(rows["local"], rows["ray"], strict=True):
        assert local["text"]
        assert local["num_decoder_tokens_kept"] < local["num_vision_tokens"]
        assert {name for name in fixed(local) if local[name] != remote[name]} == elsewhere


def test_actors_without_work_are_paid_for_too_and_a_dead_one_harms_no_end(tmp_path) -> None:
    """Asked at the end: an actor that never had an item has answered no call that would say how long it stood."""
    config = job_config(tmp_path, {"uri": "unused"}, num_vlms=2)
    cluster = Cluster()
    executor = RayExecutor(cluster, config, idle_scheduler(), make_loader=None, make_worker=None)
    executor.poll()  # one of each kind, then the rest
    executor.poll()
    cluster.vlms[1].alive = False
    assert executor.usage() == [WorkerUsage(wall_s=9.0, start_s=1.0, idle_s=8.0), WorkerUsage()]
    executor.close()
    assert not any(actor.alive for actor in cluster.vlms)

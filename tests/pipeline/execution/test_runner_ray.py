"""Tests whole runs on Ray actors, on one local cluster: order, deaths by signal, poison, bounded restarts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import psutil
import pytest

from illava.errors import ModelLoadError
from pipeline.config.schema import RuntimeConfig
from pipeline.errors import ClusterError, CredentialsError
from pipeline.execution.ray.actors import connect
from pipeline.execution.runner import run_job
from tests.support.media import clips
from tests.support.models import gated_model
from tests.support.runs import fakes
from tests.support.runs.fakes import fixed, job_config, numbered_items, read_rows, violations
from tests.support.timing import holds_in_one_of_three

pytestmark = pytest.mark.xdist_group("ray")  # one local cluster at a time

NUM_BARCODES = 300

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def cluster():
    """A cluster for every actor of these tests; `run_job` joins a session that its process already has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        runtime = RuntimeConfig(num_vlm_actors={"min": 1, "max": 8}, gpus_per_actor=0, num_reader_actors=8)
        with connect(runtime):
            yield


@pytest.fixture(scope="module")
def barcode_media(tmp_path_factory) -> Path:
    """300 clips, each with its own number in every frame."""
    folder = tmp_path_factory.mktemp("barcodes")
    for value in range(NUM_BARCODES):
        clips.write_barcode_video(folder / f"{value}.mp4", value, num_frames=3)
    return folder


def run(config, *, loader=None, **options):
    loader_factory = partial(fakes.fake_loader, **(loader or {}))
    return run_job(config, worker_factory=partial(fakes.barcode_worker, **options), loader_factory=loader_factory)


@pytest.fixture(scope="module")
def rows_by_actors(cluster, barcode_media, tmp_path_factory) -> Callable[[int], list[dict]]:
    """The rows of one job over all clips, shuffled, through real readers and so many VLM actors."""
    folder = tmp_path_factory.mktemp("actors")
    values = list(range(NUM_BARCODES))
    random.Random(1).shuffle(values)
    manifest = folder / "items.csv"
    manifest.write_text("id,uri,value\n" + "\n".join(f"clip-{v},{barcode_media}/{v}.mp4,{v}" for v in values))
    source = {"manifest": str(manifest), "uri": str(barcode_media)}

    @cache
    def rows(num_vlms: int) -> list[dict]:
        output = folder / f"{num_vlms}"
        config = job_config(output, source, executor="ray", num_vlms=num_vlms, output={"items_per_shard": 32})
        assert run_job(config, worker_factory=fakes.barcode_worker).exit_code == 0
        assert violations(output) == []
        return read_rows(output)

    return rows


@pytest.mark.parametrize("num_vlms", [1, pytest.param(2, marks=pytest.mark.long), 4])
def test_no_item_gets_another_ones_frames(rows_by_actors, num_vlms) -> None:
    """Each row's text is the number in its own video, and all but the free columns are what one actor makes."""
    rows = rows_by_actors(num_vlms)
    assert sorted(int(row["item_id"].removeprefix("clip-")) for row in rows) == list(range(NUM_BARCODES))
    assert [row for row in rows if not row["text"] == dict(row["fields"])["value"] == row["item_id"][5:]] == []
    assert list(map(fixed, rows)) == list(map(fixed, rows_by_actors(1)))


def _kill_one(folder: Path, kind: str, output: Path, killed: Path) -> None:
    """SIGKILL to the first actor of a kind once the run is under way, which waits for it."""
    deadline_s = time.monotonic() + 240
    while time.monotonic() < deadline_s:
        if (pids := sorted(folder.glob(f"{kind}-*"))) and list(output.glob("data/*.parquet")):
            os.kill(int(pids[0].name.rpartition("-")[2]), signal.SIGKILL)
            break
        time.sleep(0.005)
    killed.touch()


@pytest.mark.parametrize("kind", ["vlm", "reader"])
def test_an_actor_killed_in_the_middle_costs_nothing_but_time(cluster, tmp_path, kind) -> None:
    """In a run whose store fails every fifth item's first load, too."""
    pids, output, killed, source = (
        *(tmp_path / name for name in ("pids", "out", "killed")),
        numbered_items(tmp_path, 64),
    )
    pids.mkdir()
    config = job_config(output, source, executor="ray", runtime={"num_reader_actors": 1})
    killer = threading.Thread(target=_kill_one, args=(pids, kind, output, killed))
    killer.start()
    seen = {"pid_folder": str(pids)}
    passing = [f"item-{n}" for n in range(0, 64, 5)]
    # With the third shard waiting, four of the eight are open: whichever actor dies, another has work left.
    worker = partial(gated_model.gated_worker, gates={16: str(killed)}, sleeps={"decode_s": 0.03}, **seen)
    loader = partial(fakes.fake_loader, sleeps={"load_s": 0.02}, passing=passing, **seen)
    summary = run_job(config, worker_factory=worker, loader_factory=loader)
    killer.join()
    assert summary.exit_code == 0
    assert len(list(pids.glob(f"{kind}-*"))) == 2, "one more in the dead one's place"
    assert violations(output) == []
    assert {row["item_id"] for row in read_rows(output) if row["attempts"] > 1} >= set(passing)
    run(job_config(tmp_path / "calm", source))
    assert list(map(fixed, read_rows(output))) == list(map(fixed, read_rows(tmp_path / "calm")))


def test_an_item_that_kills_its_worker_twice_is_a_row_and_its_neighbours_are_unharmed(cluster, tmp_path) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 24), executor="ray", num_vlms=2)
    summary = run(config, poison="9")
    rows = {row["item_id"]: row for row in read_rows(tmp_path / "out")}
    assert summary.exit_code == 3
    assert [(row["item_id"], row["error_type"]) for row in rows.values() if row["status"] == "failed"] == [
        ("item-9", "worker_died")
    ]
    assert all(row["text"] == item_id[5:] for item_id, row in rows.items() if item_id != "item-9")
    assert violations(tmp_path / "out") == []


def test_an_item_that_kills_its_reader_twice_is_a_row_and_its_neighbours_are_unharmed(cluster, tmp_path) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 24), executor="ray")
    assert run(config, loader={"poison": "item-9"}).exit_code == 3
    failed = [row for row in read_rows(tmp_path / "out") if row["status"] == "failed"]
    assert [(row["item_id"], row["error_type"]) for row in failed] == [("item-9", "worker_died")]


def test_actors_that_die_repeatedly_end_the_job_with_a_message(cluster, tmp_path) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 4), executor="ray")
    with pytest.raises(ClusterError, match="the VLM actors died 4 times in a row while starting") as caught:
        run_job(config, worker_factory=fakes.dying_worker, loader_factory=fakes.fake_loader)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(("error", "message"), [(ModelLoadError, "no safetensors"), (CredentialsError, "renew it")])
def test_what_no_retry_can_mend_stops_the_job_at_once(cluster, tmp_path, error, message) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 4), executor="ray")
    factory: Callable = partial(fakes.raising_factory, error=error, message=message)
    factories = {"worker_factory": fakes.barcode_worker, "loader_factory": fakes.fake_loader}
    factories["worker_factory" if error is ModelLoadError else "loader_factory"] = factory
    with pytest.raises(error, match=message):
        run_job(config, **factories)


@pytest.mark.parametrize("stage", ["load_s", "decode_s"])
def test_a_known_sleep_appears_in_its_stage_only_and_stages_sum_to_the_latency(cluster, tmp_path, stage) -> None:
    """Across two processes and the driver: the waits between them are measured, not filled in."""
    where = {"loader": {"sleeps": {stage: 0.3}}} if stage == "load_s" else {"sleeps": {stage: 0.3}}

    @holds_in_one_of_three
    def attempt(number) -> None:
        out = tmp_path / f"out-{number}"
        run(job_config(out, numbered_items(tmp_path, 4), executor="ray", model={"max_batch_requests": 1}), **where)
        for row in read_rows(out):
            seconds = {n: row[n] for n in ("fetch_s", "load_s", "preprocess_s", "vision_s", "prefill_s", "decode_s")}
            assert 0.3 <= seconds.pop(stage) < 0.45
            assert max(seconds.values()) < 0.15
            assert row[stage] + row["queue_s"] + sum(seconds.values()) == pytest.approx(row["latency_s"], rel=0.02)


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(signal.SIGKILL, -signal.SIGKILL), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)],
)
def test_a_driver_ended_in_the_middle_takes_its_cluster_along_and_the_run_resumes(
    cluster, tmp_path, number, exit_code
) -> None:
    """The same command again: every item exactly once; none of the ended driver's processes is left."""
    output, source = tmp_path / "out", numbered_items(tmp_path, 64)
    code = (
        "from functools import partial\n"
        "from pipeline.execution.runner import run_job\n"
        "from tests.support.models.gated_model import gated_worker; from tests.support.runs import fakes\n"
        f"config = fakes.job_config({str(output)!r}, {source!r}, executor='ray')\n"
        f"gates = {{40: {str(tmp_path / 'caught')!r}}}\n"
        "work = partial(gated_worker, gates=gates, sleeps={'decode_s': 0.1})\n"
        "raise SystemExit(run_job(config, worker_factory=work, loader_factory=fakes.fake_loader).exit_code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=log, stderr=log)
    deadline_s = time.monotonic() + 240
    while not list(output.glob("data/*.parquet")):
        assert driver.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    started = psutil.Process(driver.pid).children(recursive=True)
    # Ray's two agents end only when their last call to the dead cluster has timed out, after a minute.
    started = [process for process in started if not process.name().endswith("Agent")]
    assert len(started) > 4, "its own cluster"
    driver.send_signal(number)
    (tmp_path / "caught").touch()
    assert driver.wait(timeout=240) == exit_code, (tmp_path / "log").read_text()
    _, alive = psutil.wait_procs(started, timeout=120)
    assert alive == []
    done = {part: part.stat().st_mtime_ns for part in output.glob("data/*.parquet")}
    assert len(done) < 8
    summary = run(job_config(output, source, executor="ray"))
    assert summary.num_done_before == 8 * len(done)
    assert {part: part.stat().st_mtime_ns for part in done} == done
    assert [row["text"] for row in read_rows(output)] == [str(n) for n in range(64)]
    assert violations(output) == []


@pytest.mark.long
def test_sizes_of_packets_travel_to_the_model_with_the_frames(cluster, tmp_path, onevision_folder) -> None:
    """Through decoder process, reader and object store; a model that gets none refuses `by: packets`."""
    clips.write_barcode_video(tmp_path / "clip.mp4", 5, num_frames=16)
    reducer = {"kind": "fewer_frames", "num_frames": 2, "by": "packets"}
    config = job_config(
        tmp_path / "out",
        {"uri": str(tmp_path), "pattern": "*.mp4"},
        executor="ray",
        media={"num_frames": 8},
        model={"model_id": str(onevision_folder)},
        sampling={"max_new_tokens": 2},
        reduction={"steps": [{"stage": "media", "reducer": reducer}]},
    )
    assert run_job(config).exit_code == 0
    (row,) = read_rows(tmp_path / "out")
    assert (row["error_message"], row["num_frames"]) == (None, 8)
    assert 4 * row["num_patches"] == 8 * 49

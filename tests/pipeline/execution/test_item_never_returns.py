"""Tests a hanging forward pass and an answer without end: deadline, actor's death, failed row, unharmed neighbours."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from pipeline.config.schema import RuntimeConfig
from pipeline.execution.ray.actors import connect
from pipeline.execution.runner import run_job
from tests.support.models import misbehaving_models
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, numbered_items, read_rows, violations

pytestmark = pytest.mark.xdist_group("ray")  # one local cluster at a time

ITEM_TIMEOUT_S = 4.0


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
        runtime = RuntimeConfig(num_vlm_actors={"min": 1, "max": 2}, gpus_per_actor=0, num_reader_actors=2)
        with connect(runtime):
            yield


def run(tmp_path, *, executor="ray", num_items=16, timeout_s=ITEM_TIMEOUT_S, **model):
    """Rows by item id, and the process ids that VLM workers had."""
    pids = tmp_path / "pids"
    pids.mkdir(exist_ok=True)
    runtime = {"item_timeout_s": timeout_s}
    config = job_config(tmp_path / "out", numbered_items(tmp_path, num_items), executor=executor, runtime=runtime)
    factory = partial(misbehaving_models.worker, pid_folder=str(pids), **model)
    run_job(config, worker_factory=factory, loader_factory=fakes.fake_loader)
    assert violations(tmp_path / "out") == []
    rows = {row["item_id"]: row for row in read_rows(tmp_path / "out")}
    return rows, sorted((path.stat().st_mtime_ns, int(path.name[4:])) for path in pids.iterdir())


def check_only_item_5_timed_out(rows, *, attempts) -> None:
    failed = {item_id: (row["error_type"], row["attempts"]) for item_id, row in rows.items() if row["error_type"]}
    assert failed == {"item-5": ("item_timeout", attempts)}
    assert "runtime.item_timeout_s" in rows["item-5"]["error_message"]
    assert all(row["text"] == item_id[5:] for item_id, row in rows.items() if item_id != "item-5")


@pytest.mark.long
@pytest.mark.parametrize("hold_gil", [False, True])
def test_a_forward_that_hangs_is_tried_twice_and_then_a_row(cluster, tmp_path, hold_gil) -> None:
    rows, pids = run(tmp_path, model="HangingVLM", hang=5, hold_gil=hold_gil)
    check_only_item_5_timed_out(rows, attempts=2)
    assert len(pids) == 3, "once beside others, once alone, and one that did the rest"
    hung = [psutil.Process(pid) for _, pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(hung, timeout=30)
    assert [process.pid for process in alive] == [], "no hung process is left with its GPU"


@pytest.mark.long
def test_an_answer_without_end_is_tried_twice_and_then_a_row(cluster, tmp_path) -> None:
    rows, pids = run(tmp_path, model="EndlessVLM", endless=5)
    check_only_item_5_timed_out(rows, attempts=2)
    assert len(pids) >= 2


def test_the_local_executor_ends_an_answer_without_end_between_two_steps(tmp_path) -> None:
    rows, pids = run(tmp_path, executor="local", timeout_s=1.0, model="EndlessVLM", endless=5)
    check_only_item_5_timed_out(rows, attempts=2)
    assert len(pids) == 1, "its worker begins again without being made anew"


@pytest.mark.long
def test_an_actor_whose_process_is_stopped_is_replaced(cluster, tmp_path) -> None:
    """A frozen process (SIGSTOP; a hung driver call looks alike) answers nothing and does not end by itself."""
    stopped: list[int] = []

    def stop_the_first() -> None:
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s and not stopped:
            if list(tmp_path.glob("out/data/part-*")):
                stopped.append(int(next((tmp_path / "pids").iterdir()).name[4:]))
                os.kill(stopped[0], signal.SIGSTOP)
            time.sleep(0.005)
        (tmp_path / "stopped").touch()  # the run waits for it in its middle

    thread = threading.Thread(target=stop_the_first)
    thread.start()
    gates, sleeps = {40: str(tmp_path / "stopped")}, {"decode_s": 0.03}
    rows, pids = run(tmp_path, num_items=64, model="GatedVLM", gates=gates, sleeps=sleeps)
    thread.join()
    assert stopped
    assert [row["text"] for row in rows.values()] == [item_id[5:] for item_id in rows], "nobody was to blame"
    assert len(pids) == 2
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in stopped if psutil.pid_exists(pid)], timeout=30)
    assert [process.pid for process in alive] == []

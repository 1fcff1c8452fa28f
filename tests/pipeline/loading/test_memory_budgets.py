"""Tests that the memory of readers and driver stays within what `pipeline.config.schema.RuntimeConfig` promises.

The model is fifty times slower than the readers: without the bound on bytes in flight, memory would exceed the promise.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from pipeline.config.schema import READER_AND_DRIVER_BYTES, RuntimeConfig
from pipeline.execution.ray.actors import connect
from pipeline.execution.runner import run_job
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, numbered_items, violations

pytestmark = pytest.mark.xdist_group("ray")  # one local cluster at a time

SIDE_PX = 1024  # two frames: 6.3 MB an item
ITEM_BYTES = 2 * SIDE_PX * SIDE_PX * 3
NUM_ITEMS = 40
READ_S, ANSWER_S = 0.005, 0.25
INFLIGHT_BYTES = 5 * ITEM_BYTES


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
        with connect(RuntimeConfig(gpus_per_actor=0, max_inflight_bytes=2 * NUM_ITEMS * ITEM_BYTES)):
            yield


class Watch:
    """The most that each process ever held, its own memory and what it maps of the object store apart."""

    def __init__(self, pids: Path) -> None:
        self._pids, self._ended = pids, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.own: dict[str, int] = {}
        self.shared: dict[str, int] = {}

    def __enter__(self):
        self.driver_before = psutil.Process().memory_info()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            found = {"driver": psutil.Process()}
            for path in self._pids.glob("reader-*"):
                with suppress(psutil.NoSuchProcess):
                    found[path.name] = psutil.Process(int(path.name.rpartition("-")[2]))
            for name, process in found.items():
                try:
                    memory = process.memory_info()
                except psutil.NoSuchProcess:  # the run ends its readers while it is watched
                    continue
                self.own[name] = max(self.own.get(name, 0), memory.rss - memory.shared)
                self.shared[name] = max(self.shared.get(name, 0), memory.shared)
            time.sleep(0.02)


def run(tmp_path, *, inflight_bytes: int) -> Watch:
    pids = tmp_path / "pids"
    pids.mkdir()
    config = job_config(
        tmp_path / "out",
        numbered_items(tmp_path, NUM_ITEMS),
        executor="ray",
        model={"max_batch_requests": 2},
        runtime={"max_inflight_bytes": inflight_bytes, "max_open_shards": 5},
    )
    loader = partial(fakes.fake_loader, side=SIDE_PX, sleeps={"load_s": READ_S}, pid_folder=str(pids))
    worker = partial(fakes.barcode_worker, sleeps={"decode_s": ANSWER_S})
    (tmp_path / "first").mkdir()  # a first run imports what a driver needs, some 40 MB
    first = job_config(tmp_path / "first" / "out", numbered_items(tmp_path / "first", 2), executor="ray")
    assert run_job(first, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader).exit_code == 0
    with Watch(pids) as watch:
        assert run_job(config, worker_factory=worker, loader_factory=loader).exit_code == 0
    # Two processes sample memory beside it: seconds are not what this is about.
    assert violations(tmp_path / "out") == []
    return watch


@pytest.mark.long
def test_a_model_fifty_times_slower_than_its_readers_fills_nobodys_memory(cluster, tmp_path) -> None:
    watch = run(tmp_path, inflight_bytes=INFLIGHT_BYTES)
    readers = {name: num_bytes for name, num_bytes in watch.own.items() if name.startswith("reader")}
    assert len(readers) == 2
    assert max(readers.values()) <= READER_AND_DRIVER_BYTES + 3 * ITEM_BYTES
    assert max(watch.shared[name] for name in readers) <= INFLIGHT_BYTES * 2 + READER_AND_DRIVER_BYTES
    before = watch.driver_before.rss - watch.driver_before.shared
    assert watch.own["driver"] - before <= 2 * ITEM_BYTES, "references and reports, no pixels"

"""Tests a changing cluster: a run begins where one actor of each kind fits, grows with the cluster, and shrinks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from pipeline.execution.runner import run_job
from tests.support.runs import fakes
from tests.support.runs.fakes import fixed, job_config, numbered_items, read_rows, violations

pytestmark = pytest.mark.xdist_group("ray")  # one local cluster at a time

NUM_ITEMS = 96
ROOT = Path(__file__).resolve().parents[3]
DRIVER = """
import sys
from functools import partial
from tests.support.models import gated_model
from tests.support.runs import fakes
from pipeline.execution.runner import run_job
folder, manifest, grown, shrunk = sys.argv[1:]
config = fakes.job_config(
    folder + "/out", {"manifest": manifest}, executor="ray", num_vlms=3,
    model={"max_batch_requests": 4}, runtime={"num_reader_actors": 1}, output={"items_per_shard": 4},
)
worker = partial(gated_model.gated_worker, pid_folder=folder + "/pids", gates={24: grown, 72: shrunk})
raise SystemExit(run_job(config, worker_factory=worker, loader_factory=fakes.fake_loader).exit_code)
"""


@pytest.fixture
def small_cluster(monkeypatch):
    """Two cores: one VLM actor and one reader."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    head = {"num_cpus": 2, "object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.long
def test_a_run_for_three_begins_with_one_grows_by_a_node_and_goes_on_without_it(small_cluster, tmp_path) -> None:
    """Later answers wait until the cluster has changed, so that every change comes in the middle of the run."""
    output, pids, grown, shrunk = (tmp_path / name for name in ("out", "pids", "grown", "shrunk"))
    source = numbered_items(tmp_path, NUM_ITEMS)
    pids.mkdir()
    command = [sys.executable, "-c", DRIVER, str(tmp_path), source["manifest"], str(grown), str(shrunk)]
    environment = {**os.environ, "RAY_ADDRESS": small_cluster.address}
    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def wait_until(true: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 120
        while not true():
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline_s, (tmp_path / "log").read_text()
            time.sleep(0.01)

    def num_parts() -> int:
        return len(list(output.glob("data/part-*")))

    try:
        wait_until(lambda: num_parts() >= 2)
        assert len(list(pids.iterdir())) == 1, "where two fit, one of each kind"
        node = small_cluster.add_node(num_cpus=2, object_store_memory=100_000_000)
        wait_until(lambda: len(list(pids.iterdir())) == 3)
        grown.touch()
        wait_until(lambda: num_parts() >= 12)
        small_cluster.remove_node(node, allow_graceful=False)
        # A worker outlives its raylet for a moment, and would still answer what it holds.
        wait_until(lambda: not all(psutil.pid_exists(int(path.name.partition("-")[2])) for path in pids.iterdir()))
        shrunk.touch()
        assert driver.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    finally:
        driver.kill()
        driver.wait()
    assert "a VLM actor was lost" in (tmp_path / "log").read_text()
    assert violations(output) == []
    calm = job_config(tmp_path / "calm", source, model={"max_batch_requests": 4}, output={"items_per_shard": 4})
    run_job(calm, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader)
    assert list(map(fixed, read_rows(output))) == list(map(fixed, read_rows(tmp_path / "calm")))

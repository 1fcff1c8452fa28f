"""Tests a node lost with its actors and payloads, a lost device, actors that cannot start, and two drivers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.errors import ClusterError
from pipeline.execution.runner import run_job
from pipeline.execution.scheduler import Scheduler
from tests.support.models import misbehaving_models
from tests.support.runs import fakes, one_of_two_drivers
from tests.support.runs.fakes import fixed, job_config, numbered_items, read_rows, violations
from tests.support.timing import holds_in_one_of_three

pytestmark = pytest.mark.xdist_group("ray")  # one local cluster at a time

SIZE = {"num_cpus": 3, "object_store_memory": 100_000_000}

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def nodes():
    """A head node for a VLM actor of two cores and a reader; further nodes may be added."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        cluster = Cluster(initialize_head=True, head_node_args={**SIZE, "include_dashboard": False})
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def run(config, *, side=56, **model):
    factory = partial(misbehaving_models.worker, **model)
    return run_job(config, worker_factory=factory, loader_factory=partial(fakes.fake_loader, side=side))


@pytest.mark.long
def test_a_node_is_lost_with_its_actors_and_loaded_media(nodes, tmp_path, monkeypatch) -> None:
    """A VLM actor of two cores and a reader on each of two nodes; one node goes as a medium loaded there lies ready."""
    second = nodes.add_node(**SIZE)
    nodes.wait_for_nodes()
    output, source, lost = tmp_path / "out", numbered_items(tmp_path, 64), []
    reloaded, dead, stood = [], [], set()  # leases whose media went; VLM actors that died; those that ever stood
    loaded, payloads_lost, worker_lost = Scheduler.loaded, Scheduler.payloads_lost, Scheduler.worker_lost
    assign = Scheduler.assign

    def assigned_once_both_stand(scheduler, worker, capacity) -> list:
        stood.add(worker)
        return assign(scheduler, worker, capacity) if len(stood) >= 2 else []

    def loaded_and_lost(scheduler, lease, nbytes) -> None:
        loaded(scheduler, lease, nbytes)
        started = list(output.glob("data/part-*"))
        if started and not lost and held_by(lease.payload) == {second.node_id}:
            lost.append(second)
            nodes.remove_node(second, allow_graceful=False)

    monkeypatch.setattr(Scheduler, "assign", assigned_once_both_stand)
    monkeypatch.setattr(Scheduler, "loaded", loaded_and_lost)
    monkeypatch.setattr(
        Scheduler, "payloads_lost", lambda self, leases: (reloaded.extend(leases), payloads_lost(self, leases))
    )
    monkeypatch.setattr(
        Scheduler, "worker_lost", lambda self, *args, **how: (dead.append(args), worker_lost(self, *args, **how))
    )
    runtime, shards = {"cpus_per_actor": 2}, {"items_per_shard": 4}
    config = job_config(output, source, executor="ray", num_vlms=2, runtime=runtime, output=shards)
    large = {"model": "FakeVLM", "side": 256}  # below 100 kB Ray sends media through the driver, and no node loses them
    assert run(config, **large, sleeps={"decode_s": 0.1}).exit_code == 0
    assert lost
    assert reloaded
    assert len(dead) == 1
    assert violations(output) == []
    run(job_config(tmp_path / "calm", source, output=shards), **large)
    assert list(map(fixed, read_rows(output))) == list(map(fixed, read_rows(tmp_path / "calm")))


def held_by(reference) -> set[str]:
    """The nodes whose stores hold an object."""
    return set(ray.experimental.get_object_locations([reference])[reference]["node_ids"])


@pytest.mark.long
def test_a_lost_device_replaces_the_actor_and_costs_no_item(nodes, tmp_path) -> None:
    config = job_config(
        tmp_path / "out", numbered_items(tmp_path, 12), executor="ray", runtime={"num_reader_actors": 1}
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    summary = run(config, model="LostDeviceVLM", trigger=5, flag=str(tmp_path / "flag"), pid_folder=str(pids))
    assert summary.exit_code == 0
    assert [row["text"] for row in read_rows(tmp_path / "out")] == [str(n) for n in range(12)]
    assert len(list(pids.iterdir())) == 2
    assert violations(tmp_path / "out") == []


@pytest.mark.long
def test_an_item_that_loses_the_device_each_time_is_a_row_that_says_how(nodes, tmp_path) -> None:
    config = job_config(
        tmp_path / "out", numbered_items(tmp_path, 12), executor="ray", runtime={"num_reader_actors": 1}
    )
    assert run(config, model="LostDeviceVLM", trigger=5).exit_code == 3
    rows = {row["item_id"]: row for row in read_rows(tmp_path / "out")}
    failed = {item_id: row["error_type"] for item_id, row in rows.items() if row["error_type"]}
    assert failed == {"item-5": "worker_died"}
    assert "device-side assert" in rows["item-5"]["error_message"]


@pytest.mark.long
def test_vlm_actors_that_all_die_at_work_end_the_job_with_a_message_within_a_minute(nodes, tmp_path) -> None:
    """Not one item's fault: whatever is tried, the device is lost. Nothing hangs."""

    @holds_in_one_of_three
    def attempt(number) -> None:
        source, runtime = numbered_items(tmp_path, 12), {"num_reader_actors": 1}
        config = job_config(tmp_path / f"out-{number}", source, executor="ray", runtime=runtime)
        began_s = time.monotonic()
        with pytest.raises(ClusterError, match=r"VLM actors died \d+ times in a row.*same command again"):
            run_job(config, worker_factory=misbehaving_models.worker_without_device, loader_factory=fakes.fake_loader)
        assert time.monotonic() - began_s < 60


def test_two_drivers_that_create_and_publish_at_the_same_moments_leave_every_item_once(tmp_path) -> None:
    output, source, gates = tmp_path / "out", numbered_items(tmp_path, 40), tmp_path / "gates"
    gates.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, one_of_two_drivers.__file__, str(output), json.dumps(source), str(gates)]
    start = partial(subprocess.Popen, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    drivers = [start([*command, name]) for name in ("one", "other")]
    ends = [driver.communicate(timeout=300)[1].decode() for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], ends
    met = {point: len(list(gates.glob(f"{point}-*"))) for point in ("write", "publish_before")}
    assert met == {"write": 2, "publish_before": 10}  # one creation of run.json and all five parts each
    assert [row["text"] for row in read_rows(output)] == [str(n) for n in range(40)]
    # Seconds apart: processes that wait for each other may be kept from the processor between two stamps.
    assert violations(output) == []

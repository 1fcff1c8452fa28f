"""Tests the cost of real runs: items + idle + load = what actors and readers measured; sessions add up."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from pipeline.config.schema import RuntimeConfig
from pipeline.execution.budget import Budget
from pipeline.execution.ray.actors import connect
from pipeline.execution.ray.metrics import COUNTERS, GAUGES, STAGE_SECONDS
from pipeline.execution.runner import continue_run, run_job
from pipeline.inspection.status import run_status
from pipeline.runs.retry import begin_retry
from pipeline.runs.run import open_run, unfinish
from pipeline.runs.sessions import Session
from tests.support.media import clips
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, read_rows, violations

PRICES = {"gpu_hour_usd": 2.5, "cpu_hour_usd": 0.04, "storage_request_usd": 0.0000004}
SLEEPS = {"sleeps": {"vision_s": 0.01, "decode_s": 0.01}}


def _worker(config, run_info):
    return fakes.barcode_worker(config, run_info, **SLEEPS)


@pytest.fixture
def media(tmp_path) -> str:
    """Eleven clips and one that is none: reading it costs, too."""
    folder = tmp_path / "in"
    folder.mkdir()
    for value in range(11):
        clips.write_barcode_video(folder / f"{value}.mp4", value, num_frames=3)
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:400])
    return str(folder)


def config_of(tmp_path: Path, media: str, **sections):
    sections = {"prices": PRICES, "output": {"items_per_shard": 4}, **sections}
    return job_config(tmp_path / "out", {"uri": media}, **sections)


def cost_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "_RUN.json").read_text())["cost"]


def check_sum(tmp_path: Path, cost: dict) -> None:
    rows = read_rows(tmp_path / "out")
    items_usd = sum(row["cost_usd"] for row in rows)
    assert cost["items_usd"] == pytest.approx(items_usd, rel=1e-9)
    assert items_usd + cost["idle_usd"] + cost["load_usd"] == pytest.approx(cost["total_usd"], rel=0.001)
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert failed["cost_usd"] > 0
    cpu_usd = sum(row["cpu_s"] for row in rows) * PRICES["cpu_hour_usd"] / 3600
    actor_rate = PRICES["cpu_hour_usd"] / 3600  # one core and no GPU
    assert cost["total_usd"] == pytest.approx(cost["actor_s"] * actor_rate + cpu_usd, rel=0.001)
    assert violations(tmp_path / "out") == []


def test_the_parts_of_a_local_run_sum_to_its_cost_also_over_two_sessions(tmp_path, media) -> None:
    config = config_of(tmp_path, media, runtime={"max_open_shards": 1})
    first = run_job(config, worker_factory=_worker, budget=Budget(0.001, "s"))
    assert 0 < first.stats.num_rows < 12
    assert not (tmp_path / "out" / "_RUN.json").exists()
    second = run_job(config, worker_factory=_worker)
    cost = cost_of(tmp_path)
    assert (cost["num_sessions"], cost["num_sessions_unknown"]) == (2, 0)
    assert first.cost.total_usd + second.cost.total_usd == pytest.approx(cost["total_usd"], rel=1e-9)
    check_sum(tmp_path, cost)
    assert run_job(config, worker_factory=_worker).cost.total_usd == 0  # nothing to do costs nothing
    assert cost_of(tmp_path) == cost


def test_what_a_retry_replaces_and_what_a_killed_session_spent_is_not_hidden(tmp_path, media) -> None:
    config = config_of(tmp_path, media)
    run_job(config, worker_factory=_worker)
    (before,) = [row for row in read_rows(tmp_path / "out") if row["status"] == "failed"]
    Session(open_run(config))  # begun, and never heard of again
    continue_run(begin_retry(str(tmp_path / "out")), worker_factory=_worker)
    cost = cost_of(tmp_path)
    assert (cost["num_sessions"], cost["num_sessions_unknown"]) == (3, 1)
    assert cost["lost_usd"] == pytest.approx(before["cost_usd"], abs=0.001 * cost["total_usd"])
    unfinish(open_run(config))
    assert not run_status(str(tmp_path / "out")).finished


@pytest.mark.xdist_group("ray")
@pytest.mark.long
def test_a_ray_run_of_several_actors_sums_up_and_is_seen_by_prometheus(tmp_path, media, monkeypatch) -> None:
    import ray

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    config = config_of(tmp_path, media, executor="ray", num_vlms=2).model_copy(update={"name": "metered"})
    runtime = RuntimeConfig(num_vlm_actors={"min": 1, "max": 2}, gpus_per_actor=0, num_reader_actors=2)
    with connect(runtime):
        summary = run_job(config, worker_factory=fakes.barcode_worker)
        (node,) = ray.nodes()
        exported = _exported(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics")
    assert len(summary.workers) == 2
    check_sum(tmp_path, cost_of(tmp_path))
    rows = read_rows(tmp_path / "out")
    assert sum(exported["ray_illava_items_total"]) == len(rows)
    kept = sum(row["num_vision_tokens_kept"] for row in rows)
    assert sum(exported["ray_illava_vision_tokens_kept_total"]) == kept
    assert sum(exported["ray_illava_items_cost_usd_total"]) == pytest.approx(sum(row["cost_usd"] for row in rows))
    assert max(exported[f"ray_{STAGE_SECONDS}_bucket"]) == sum(row["status"] != "failed" for row in rows)
    never = {"ray_illava_retries_total", "ray_illava_fetched_bytes_total", "ray_illava_loops_total"}  # media are local
    if not any(row["status"] == "failed" for row in rows):
        never.add("ray_illava_failures_total")
    assert exported.keys() >= {f"ray_{name}_total" for name in COUNTERS} - never
    assert exported.keys() >= {f"ray_{name}" for name in GAUGES}
    assert exported["ray_illava_planned_items"] == [12]


def _exported(url: str) -> dict[str, list[float]]:
    """What the metrics endpoint says of this job, once it says anything: it is told every few seconds."""
    import time

    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        with urllib.request.urlopen(url, timeout=30) as answer:
            lines = [line for line in answer.read().decode().splitlines() if 'job_name="metered"' in line]
        found: dict[str, list[float]] = {}
        for line in lines:
            found.setdefault(line.partition("{")[0], []).append(float(line.rpartition(" ")[2]))
        if sum(found.get("ray_illava_items_total", [])) == 12:
            return found
        time.sleep(1)
    raise AssertionError(f"{url} never told of 12 items; it says {lines}")

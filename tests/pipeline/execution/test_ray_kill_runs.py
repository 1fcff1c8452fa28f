"""Kills real processes of real Ray runs at seeded moments: three runs of benchmarks/reliability/ray_kill_runs.py."""

from __future__ import annotations

import pytest

from benchmarks.reliability import ray_kill_runs

pytestmark = pytest.mark.xdist_group("ray")  # one local cluster at a time


@pytest.fixture(scope="module")
def cluster():
    with ray_kill_runs.cluster():
        yield


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 2, 3], ids=["decoder child", "VLM actor", "driver"])
def test_nothing_is_lost_or_doubled_and_a_death_costs_what_it_may(cluster, tmp_path, seed) -> None:
    outcome = ray_kill_runs.play(seed, tmp_path)
    assert outcome.violations == []
    assert outcome.killed_at >= 0, "the run ended before"
    assert (outcome.num_lost, outcome.num_doubled) == (0, 0)
    assert outcome.num_again <= ray_kill_runs.MAX_COST[outcome.victim]

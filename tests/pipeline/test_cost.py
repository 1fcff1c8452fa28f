"""Costs: prices times seconds, and the parts of a run's cost sum to the whole."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import PricesConfig
from pipeline.cost import RunCost, item_cost_usd, run_cost, spending
from tests.support.runs.run_folders import make_config

PRICES = PricesConfig(gpu_hour_usd=3.6, cpu_hour_usd=0.36, storage_request_usd=0.0000004)


def test_an_item_costs_its_seconds_and_requests():
    assert item_cost_usd(PRICES, gpu_s=10, cpu_s=0) == pytest.approx(0.01)
    assert item_cost_usd(PRICES, gpu_s=0, cpu_s=10) == pytest.approx(0.001)
    assert item_cost_usd(PRICES, gpu_s=0, cpu_s=0, storage_requests=10) == pytest.approx(0.000004)
    assert item_cost_usd(PRICES, gpu_s=10, cpu_s=10, storage_requests=10) == pytest.approx(0.011004)


def test_a_device_second_costs_what_the_actor_holds():
    assert item_cost_usd(PRICES, gpu_s=10, cpu_s=0, gpus_per_actor=0.5) == pytest.approx(0.005)
    assert item_cost_usd(PRICES, gpu_s=10, cpu_s=0, gpus_per_actor=0, cpus_per_actor=2) == pytest.approx(0.002)


def test_nothing_costs_nothing():
    assert item_cost_usd(PricesConfig(), gpu_s=1e6, cpu_s=1e6, storage_requests=10**6) == 0
    assert RunCost(0, 0, 0, 0).per_item_usd(0) == 0


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4)), max_size=50), st.floats(0, 1e5), st.floats(0, 1e4))
def test_items_idle_and_load_are_the_actors_time(items, idle_s, load_s):
    runtime = {"gpus_per_actor": 0.5, "cpus_per_actor": 4}
    config = make_config("m", prices=PRICES.model_dump(), runtime=runtime)
    rates = {"gpus_per_actor": 0.5, "cpus_per_actor": 4}
    rows = [item_cost_usd(PRICES, gpu_s=gpu_s, cpu_s=cpu_s, **rates) for gpu_s, cpu_s in items]
    actor_s, cpu_s = sum(gpu_s for gpu_s, _ in items) + idle_s + load_s, sum(cpu_s for _, cpu_s in items)
    parts = {"actor_s": actor_s, "load_s": load_s, "idle_s": idle_s, "reader_cpu_s": cpu_s, "storage_requests": 0}
    cost = run_cost(spending(config, wall_s=1.0, **parts), math.fsum(rows))
    expected = actor_s * (0.5 * 3.6 + 4 * 0.36) / 3600 + cpu_s * 0.36 / 3600
    assert cost.total_usd == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert cost.lost_usd == pytest.approx(0, abs=1e-9 * cost.total_usd + 1e-15)

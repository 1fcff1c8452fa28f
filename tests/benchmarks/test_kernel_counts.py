"""What one video asks of a GPU, counted on a stand-in at small shapes; a count that grows fails here.

The same at 7B shapes stands in benchmarks/results/kernel_counts_7b.json. Kernels a layer do not depend on the width.
"""

import json

import pytest
import torch

from benchmarks.common.result_files import RESULTS
from benchmarks.speed.kernel_counts import count
from illava import preset
from illava.plan import EMPTY_PLAN

# (kernels, blocking copies, elementwise GB) at most, at a second request of the same shapes. The one copy of a prefill
# reads the drawn token.
BOUNDS = {
    ("empty", "tower"): (135, 0, 0.024),
    ("empty", "prefill"): (123, 1, 0.007),
    ("plan", "tower"): (379, 0, 0.022),
    ("plan", "prefill"): (258, 1, 0.005),
}
STEP_KERNELS = 88 + 16  # of a captured step of six layers, and of its greedy draw


@pytest.fixture(scope="module")
def counted():
    plans = {"empty": EMPTY_PLAN, "plan": preset("illava-small-video", layout="geometric")}
    return count("tiny", frames=2, dtype=torch.bfloat16, plans=plans)


@pytest.mark.parametrize(("plan", "stage"), BOUNDS)
def test_a_second_request_asks_for_no_more_than_today(counted, plan, stage):
    found, (kernels, blocking, elementwise_gb) = counted["plans"][plan][stage]["second"], BOUNDS[plan, stage]
    assert found["kernels"] <= kernels, found["kernels_by_name"]
    assert found["blocking_copies"] <= blocking, found["blocking_by_line"]
    assert found["elementwise_gb"] <= elementwise_gb


def test_a_captured_step_has_no_more_kernels_than_today_and_waits_for_nothing(counted):
    for step in counted["captured_step"].values():
        assert step["kernels"] <= STEP_KERNELS, step["kernels_by_name"]
        assert step["blocking_copies"] == step["other_copies"] == 0, step["blocking_by_line"]


def test_a_decode_step_outside_of_a_graph_waits_for_its_tokens_alone(counted):
    """The host waits for the event behind their copy; of what it brings to the device a composition has five parts."""
    for plan in counted["plans"].values():
        assert plan["decode"]["second"]["blocking_copies"] == 0, plan["decode"]["second"]["blocking_by_line"]
        assert plan["decode"]["second"]["kernels"] <= STEP_KERNELS, plan["decode"]["second"]["kernels_by_name"]


def test_the_committed_counts_are_of_the_true_shapes():
    found = json.loads((RESULTS / "kernel_counts_7b.json").read_text())
    assert (found["setting"]["shape"], found["setting"]["frames"]) == ("7b", 32)
    assert all(step["kernels"] <= 400 for step in found["captured_step"].values())
    for plan in found["plans"].values():
        assert plan["tower"]["second"]["blocking_copies"] == 0
        assert plan["prefill"]["second"]["blocking_copies"] == 1
        assert plan["prefill"]["second"]["elementwise_gb"] <= 64

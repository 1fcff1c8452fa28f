"""What one video asks of a GPU, counted on a stand-in at small shapes; a count that grows fails here.

The same at 7B shapes stands in benchmarks/results/kernel_counts_7b.json. Kernels a layer do not depend on the width.
"""

import json

import pytest
import torch

from benchmarks.common.result_files import RESULTS
from benchmarks.common.stand_in_cuda import DEVICE, StandInCuda
from benchmarks.speed.kernel_counts import count
from illava import preset
from illava.decoder.kv_cache import PagedCache
from illava.plan import EMPTY_PLAN

# (kernels, blocking copies, elementwise GB) at most, at a second request of the same shapes. The one copy of a prefill
# reads the drawn token.
BOUNDS = {
    ("empty", "tower"): (135, 0, 0.024),
    ("empty", "prefill"): (125, 1, 0.007),
    ("plan", "tower"): (374, 0, 0.022),
    ("plan", "prefill"): (260, 1, 0.005),
    ("sizes", "tower"): (385, 0, 0.038),
    ("sizes", "prefill"): (253, 1, 0.008),
}
STEP_KERNELS = 88 + 5  # of a captured step of six layers; its greedy draw, and what puts that in its place
EAGER_KERNELS = 101  # of a step that is not captured, its drawing operation by operation


def sizes_plan():
    """`ward-video-50` in a tower of eight blocks."""
    plan = preset("ward-video-50", layout="geometric")
    cuts, before_llm = plan.steps
    return plan.model_copy(update={"steps": (cuts.model_copy(update={"layers": (3, 5)}), before_llm)})


@pytest.fixture(scope="module")
def counted():
    small = preset("illava-small-video", layout="geometric")
    plans = {"empty": EMPTY_PLAN, "plan": small, "sizes": sizes_plan()}
    return count("tiny", frames=2, dtype=torch.bfloat16, plans=plans)


@pytest.mark.parametrize(("plan", "stage"), BOUNDS)
def test_a_second_request_asks_for_no_more_than_today(counted, plan, stage):
    found, (kernels, blocking, elementwise_gb) = counted["plans"][plan][stage]["second"], BOUNDS[plan, stage]
    assert found["kernels"] <= kernels, found["kernels_by_name"]
    assert found["blocking_copies"] <= blocking, found["blocking_by_line"]
    assert found["elementwise_gb"] <= elementwise_gb


def test_scores_begin_with_what_the_attention_computed(counted):
    """No block that is scored runs the score kernel's first pass; `ward` by contrast asks for no score at all."""
    scored, by_contrast = (counted["plans"][plan]["tower"]["second"]["kernels_by_name"] for plan in ("plan", "sizes"))
    assert scored["_sum_received"] > 0
    assert "_log_sum_exp" not in scored
    assert by_contrast["_contrast"] == 2
    assert not {"_sum_received", "_log_sum_exp"} & set(by_contrast)


def test_pixels_of_a_video_that_waits_are_copied_while_another_is_encoded(counted):
    found = counted["video_behind_another"]
    assert found["side_stream_copies"] == 1
    assert found["other_copies_of_second"] == found["other_copies_of_first"] - 1
    assert found["blocking_copies"] == 0


def test_a_captured_step_has_no_more_kernels_than_today_and_waits_for_nothing(counted):
    for step in counted["captured_step"].values():
        assert step["kernels"] <= STEP_KERNELS, step["kernels_by_name"]
        assert step["blocking_copies"] == step["other_copies"] == 0, step["blocking_by_line"]


def test_a_decode_step_outside_of_a_graph_waits_for_its_tokens_alone(counted):
    """The host waits for the event behind their copy; of what it brings to the device a composition has five parts."""
    for plan in counted["plans"].values():
        assert plan["decode"]["second"]["blocking_copies"] == 0, plan["decode"]["second"]["blocking_by_line"]
        assert plan["decode"]["second"]["kernels"] <= EAGER_KERNELS, plan["decode"]["second"]["kernels_by_name"]


def test_the_committed_counts_are_of_the_true_shapes():
    found = json.loads((RESULTS / "kernel_counts_7b.json").read_text())
    assert (found["setting"]["shape"], found["setting"]["frames"]) == ("7b", 32)
    assert all(step["kernels"] <= 400 for step in found["captured_step"].values())
    assert {"empty", "plan", "ward-video-50", "ward-video-25"} <= set(found["plans"])
    assert found["video_behind_another"]["side_stream_copies"] == 1
    for name, kernels, elementwise_gb in (("empty", 351, 26.8), ("plan", 590, 17.4), ("ward-video-25", 721, 20.0)):
        tower = found["plans"][name]["tower"]["second"]
        assert tower["kernels"] <= kernels
        assert tower["elementwise_gb"] <= elementwise_gb
    for name, plan in found["plans"].items():
        if name.startswith("ward"):  # a cut's rounds are one kernel, whatever they are
            assert plan["tower"]["second"]["kernels_by_name"]["_agglomerate"] == 2
            assert plan["prefill"]["second"]["kernels_by_name"]["_agglomerate"] == 1
        assert plan["tower"]["second"]["blocking_copies"] == 0
        assert "_log_sum_exp" not in plan["tower"]["second"]["kernels_by_name"]
        assert plan["prefill"]["second"]["blocking_copies"] == 1
        assert plan["prefill"]["second"]["elementwise_gb"] <= 64


def test_a_request_that_joins_brings_its_own_table_to_the_device():
    """Of 28 layers and 400 blocks each; before, all nine tables came at once: 403 kB, and again with every change."""
    layers, blocks = 28, 400
    with StandInCuda() as stand_in, torch.inference_mode():
        cache = PagedCache(
            num_layers=layers, num_kv_heads=1, head_dim=8, num_blocks=10 * layers * blocks, block_size=16,
            dtype=torch.bfloat16, device=DEVICE,
        )  # fmt: skip
        held = [16 * blocks] * layers
        for row in range(8):
            cache.admit(row, held)
        cache.batch(range(8), [[6000] * layers] * 8)
        with stand_in.recorded() as joined:
            cache.admit(8, held)
            cache.batch(range(9), [[6000] * layers] * 9)
        with stand_in.recorded() as left:
            cache.free(3)
            cache.batch([0, 1, 2, *range(4, 9)], [[6000] * layers] * 8)
    lengths, rows = 4 * layers * 9, 8 * 9
    assert joined.arrived_bytes == 4 * layers * blocks + lengths + rows
    assert left.arrived_bytes == (lengths + rows) * 8 // 9
    assert joined.num_blocking == left.num_blocking == 0
    assert (joined.copies, left.copies) == (3, 2)

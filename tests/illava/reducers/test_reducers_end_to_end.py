"""Every registered reducer at every stage, through `VLM.generate` on the tiny OneVision: it runs, or is refused."""

import numpy as np
import pytest
import torch

from illava import VLM, ReductionPlan, Request, SamplingParams, load_preprocessor
from illava.errors import PlanError
from illava.reducers import REDUCERS, Evidence, ToMe
from illava.reduction.evidence import DECODER_EVIDENCE, VISION_EVIDENCE
from illava.reduction.vision import VisionReduction
from illava.tokens import Tokens
from tests.support.closeness import assert_close

MEASURED = {**VISION_EVIDENCE, **DECODER_EVIDENCE}
LAYERS = {"vision_block": [2, 5], "decoder_layer": [1, 2]}


def settings_of(kind):
    """What each method is tried with: its defaults and half the tokens; where it can, the attention of a CLS token."""
    fields = REDUCERS[kind].model_fields
    own = {"kind": kind}
    if "keep_ratio" in fields:
        own["keep_ratio"] = 0.5
    if "grid" in fields:
        own["grid"] = (2, 3)
    if "epsilon" in fields:
        own["epsilon"] = 0.6
    yield own
    if "saliency" in fields:
        other = {"attention_received", "cls_attention"} - {fields["saliency"].default}
        yield {**own, "saliency": other.pop()}


CASES = [
    pytest.param(stage, own, id=f"{own['kind']}-{own.get('saliency', 'default')}-{stage}")
    for kind, reducer in REDUCERS.items()
    for own in settings_of(kind)
    for stage in sorted(reducer.stages - {"media"})  # tests/illava/families/test_family_matrix.py
]


def plan_of(stage, own, layers=None):
    step = {"stage": stage, "reducer": own}
    if stage in LAYERS:
        step["layers"] = LAYERS[stage][-1:] if layers is None else layers
    return ReductionPlan.model_validate({"steps": [step]})


@pytest.fixture(scope="module")
def vlm(onevision_folder):
    return VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)


@pytest.fixture(scope="module")
def requests(onevision_folder):
    pre, rng = load_preprocessor(str(onevision_folder)), np.random.default_rng(10)

    def picture(height=48, width=64):
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    sampling = SamplingParams(max_new_tokens=3, min_new_tokens=3)
    image = pre.images([picture(70, 150)])[0]
    contents = {
        "a": (pre.video([picture() for _ in range(3)]), "What happens?"),
        "b": (image, "What is it?"),
        "c": (pre.video([picture() for _ in range(2)]), "Then", image, "and?"),
    }
    return [Request(name, content, sampling, trace=True) for name, content in contents.items()]


def places_before(trace, stage, layer):
    """Places of the tokens that a traced step took, int64 [T, 4]."""
    before = trace.patch_coords
    for step in trace.steps:
        if (step.stage, step.layer) == (stage, layer):
            return before, step
        before = step.coords
    raise AssertionError(f"no step at {stage} {layer}")


def scope_lengths(coord_T4, stage, reducer):
    """Tokens of each segment that is ranked on its own."""
    if not stage.startswith("vision") and reducer.per == "prompt":
        return [len(coord_T4)]
    owner_TX = coord_T4[:, : 2 if stage.startswith("vision") else 1]
    return torch.unique(owner_TX, dim=0, return_counts=True)[1].tolist()


@pytest.mark.parametrize(("stage", "own"), CASES)
def test_it_runs_alike_alone_and_in_a_batch_or_is_refused(vlm, requests, stage, own):
    plan = plan_of(stage, own)
    reducer = plan.steps[0].reducer
    lacking = reducer.evidence(stage) - MEASURED[stage]
    if lacking:
        with pytest.raises(PlanError, match=f"'{own['kind']}'.* needs {', '.join(sorted(lacking))}: not known"):
            vlm.generate(requests, plan=plan)
        return
    if (
        reducer.merges_frames
    ):  # of an image alone there is nothing to join; tests/illava/reduction/test_frame_merging.py
        requests = [request for request in requests if request.content[0].kind == "video"]
    together = vlm.generate(requests, plan=plan)
    assert [one.error for one in together] == [None] * len(requests)
    layer = plan.steps[0].layers[0] if plan.steps[0].layers else None
    for one in together:
        coord_T4, step = places_before(one.trace, stage, layer)
        kept = [reducer.num_kept(n) for n in scope_lengths(coord_T4, stage, reducer)]
        num_kept, num_before = step.matrix.shape
        assert 0 < num_kept < num_before == len(coord_T4)
        if None not in kept:
            assert num_kept == sum(kept)
    (alone,), beside = vlm.generate(requests[-1:], plan=plan), together[-1]
    assert (beside.token_ids, beside.usage) == (alone.token_ids, alone.usage)
    kept_tokens = [set(map(tuple, places_before(g.trace, stage, layer)[1].coords.tolist())) for g in (alone, beside)]
    # products of other shapes differ in last bits, which may decide between near-equal tokens
    assert len(kept_tokens[0] ^ kept_tokens[1]) <= 0.05 * len(kept_tokens[0])


def test_only_the_attention_of_a_cls_token_is_wanting_in_this_model():
    """So that a kind of evidence that is no longer wired makes a test fail, not a case turn into a refusal."""
    refused = {case.id for case in CASES if _lacking(*case.values)}
    assert refused == {case.id for case in CASES if "-cls_attention-" in case.id}
    assert all(_lacking(*case.values) <= {"cls_attention"} for case in CASES)


def _lacking(stage, own):
    return plan_of(stage, own).steps[0].reducer.evidence(stage) - MEASURED[stage]


PARTITIONS = ({"kind": "tome"}, {"kind": "greedy"}, {"kind": "kmeans"}, {"kind": "ward"})


@pytest.mark.parametrize("stage", LAYERS)
@pytest.mark.parametrize("own", PARTITIONS, ids=lambda own: own["kind"])
def test_a_token_merged_twice_is_the_plain_mean_of_all_it_stands_for(vlm, requests, stage, own):
    """Only true where the second step weighs the first step's mixtures by their sizes."""
    budget = {"keep_ratio": 0.6} if stage == "decoder_layer" else {"num_merged": 14}
    for one in vlm.generate(requests, plan=plan_of(stage, own | budget, LAYERS[stage])):
        first, second = (places_before(one.trace, stage, layer)[1].matrix for layer in LAYERS[stage])
        both = second.to_dense() @ first.to_dense()
        assert (both > 0).sum(1).max() > 2
        assert_close(both, (both > 0) / (both > 0).sum(1, keepdim=True))


def test_sizes_reach_from_the_last_block_to_behind_the_tower(vlm, requests):
    step = {"stage": "vision_block", "layers": [7], "reducer": {"kind": "tome", "num_merged": 20}}
    output = {"stage": "vision_output", "reducer": {"kind": "tome", "num_merged": 10}}
    for one in vlm.generate(requests, plan=ReductionPlan.model_validate({"steps": [step, output]})):
        first, second = one.trace.steps[0].matrix, one.trace.steps[1].matrix
        both = second.to_dense() @ first.to_dense()
        assert_close(both, (both > 0) / (both > 0).sum(1, keepdim=True))


@pytest.mark.parametrize(("has_cls", "group_side"), [(True, 1), (False, 2)])
def test_sizes_are_kept_beside_a_cls_token_and_by_whole_groups(has_cls, group_side):
    torch.manual_seed(0)
    size = group_side**2
    coord_T3 = torch.cartesian_prod(torch.arange(2), torch.arange(12), torch.arange(size))
    plan = plan_of("vision_block", {"kind": "kmeans", "num_merged": 4}, [0, 1])
    lengths = (12 * size, 12 * size)
    reduction = VisionReduction(
        plan, lengths, coord_T3, num_blocks=2, has_cls=has_cls, group_side=group_side, seeds=(0, 0)
    )
    hidden_TD = torch.randn(sum(lengths) + 2 * has_cls, 6)
    for block in range(2):
        k_THd = torch.randn(len(hidden_TD), 2, 4)
        hidden_TD = reduction.at(block, hidden_TD, k_THd, k_THd, scale=1.0)
    first, second = (step.assignment.matrix().to_dense() for step in reduction.steps)
    both = second @ first
    assert len(both) == 8 * size
    assert (both > 0).sum(1).max() > 2
    assert_close(both, (both > 0) / (both > 0).sum(1, keepdim=True))


def test_keys_behind_the_tower_are_those_of_its_last_block():
    torch.manual_seed(0)
    coord_T3 = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3))
    plan = plan_of("vision_output", {"kind": "tome", "num_merged": 2})
    reduction = VisionReduction(plan, (9, 9), coord_T3, num_blocks=2)
    hidden_TD, keys = torch.randn(18, 8), [torch.randn(18, 2, 4) for _ in range(2)]
    for block, k_THd in enumerate(keys):
        hidden_TD = reduction.at(block, hidden_TD, k_THd, k_THd, scale=1.0)
    reduction.after_tower(hidden_TD)
    tokens = Tokens(hidden_TD, (9, 9), coord_T3)
    expected = [ToMe(num_merged=2).assign(tokens, Evidence(keys_THd=k), "vision_output").kept_K for k in keys]
    assert torch.equal(reduction.steps[0].assignment.kept_K, expected[1])
    assert not torch.equal(*expected)


@pytest.mark.parametrize("stage", ["vision_block", "vision_output"])
def test_a_draw_in_the_tower_follows_seed_request_medium_tile_and_layer(vlm, requests, stage):
    layers = LAYERS.get(stage)
    plan = plan_of(stage, {"kind": "random", "num_merged": 20}, layers)

    def draws(request):
        (one,) = vlm.generate([request], plan=plan)
        assert one.error is None
        return [places_before(one.trace, stage, layer)[1].coords for layer in layers or [None]]

    content, sampling = requests[2].content, requests[2].sampling
    twice = (content[2], "and", content[2], "?")
    base = draws(Request("x", twice, sampling, trace=True))
    again = draws(Request("x", twice, sampling, trace=True))
    other_id = draws(Request("y", twice, sampling, trace=True))
    seeded = SamplingParams(max_new_tokens=3, min_new_tokens=3, seed=sampling.seed + 1)
    other_seed = draws(Request("x", twice, seeded, trace=True))
    assert torch.equal(base[0], again[0])
    assert not torch.equal(base[0], other_id[0])
    assert not torch.equal(base[0], other_seed[0])
    of_tile = {}
    for mm_index, tile, row, col in base[0].tolist():
        of_tile.setdefault((mm_index, tile), []).append((row, col))
    assert len(of_tile) > 2
    assert len({tuple(places) for places in of_tile.values()}) == len(of_tile)

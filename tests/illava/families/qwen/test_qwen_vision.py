"""Reduction in the Qwen towers against a slow tower written apart; traces, other reducers, plans that make no sense."""

import math

import pytest
import torch
from torch.nn.functional import interpolate

from illava.errors import PlanError
from illava.plan import ReductionPlan, preset
from illava.reducers import REDUCERS
from illava.reduction.evidence import VISION_EVIDENCE
from tests.support.closeness import assert_close
from tests.support.models.qwen_towers import BLOCKS, encode, picture, plan, video

pytestmark = pytest.mark.numeric

# The oracle: one temporal patch at a time, patches as a dict of places, attention maps written out.


def rotated(x_NHd, places, base=10000.0):
    """Halves rotate: the first half of the angles belongs to the row, the second to the column."""
    width = x_NHd.shape[-1]
    freq = base ** -(torch.arange(0, width // 2, 2).float() / (width // 2))
    angle = torch.stack([torch.cat([row * freq, col * freq]) for row, col in places])[:, None]
    left, right = x_NHd.chunk(2, -1)
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)


def attention_map(block, hidden_ND, places, allowed_NN=None):
    heads = block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(hidden_ND)).view(len(places), 3, heads, -1)
    q, k = rotated(qkv[:, 0], places), rotated(qkv[:, 1], places)
    logits = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    if allowed_NN is not None:
        logits = logits.masked_fill(~allowed_NN, float("-inf"))
    attention = logits.softmax(-1)
    mixed = torch.einsum("hij,jhd->ihd", attention, qkv[:, 2]).flatten(1)
    return attention, hidden_ND + block.attn.proj(mixed)


def merging(attention, num_groups, keep_ratio):
    """Section 1 of the method on whole groups, whose patches stand side by side: weights [kept, groups]; the kept."""
    received = attention.mean((0, 1)).tolist()
    scores = [sum(received[4 * n : 4 * n + 4]) / 4 for n in range(num_groups)]
    removed = num_groups - max(1, round(num_groups * keep_ratio))
    order = sorted(range(num_groups), key=lambda n: scores[n])
    taken, total = order[: removed + 1], (removed + 1) * (removed + 2) / 2
    kept = [n for n in range(num_groups) if n not in taken[:-1]]
    weight_KG = torch.eye(num_groups)[kept]
    if removed:
        weight_KG[kept.index(taken[-1])] = 0
        for m, n in enumerate(taken):
            weight_KG[kept.index(taken[-1]), n] = (removed + 1 - m) / total
    return weight_KG, kept


def positioned(tower, hidden_ND, places, grid):
    """Qwen3's learned positions, stretched over the picture from corner to corner."""
    if not hasattr(tower, "pos_embed"):
        return hidden_ND
    side = tower.num_grid_per_side
    table = tower.pos_embed.weight.T.view(1, -1, side, side)
    stretched = interpolate(table, size=(grid.rows, grid.cols), mode="bilinear", align_corners=True)[0]
    return hidden_ND + torch.stack([stretched[:, row, col] for row, col in places])


def slow_segment(tower, hidden_ND, grid, blocks, keep_ratio):
    """One temporal patch through the tower: vision tokens, the places of their groups, deepstack features."""
    places = [
        (2 * row + i, 2 * col + j)
        for row in range(grid.rows // 2)
        for col in range(grid.cols // 2)
        for i in (0, 1)
        for j in (0, 1)
    ]
    hidden_ND, deepstack = positioned(tower, hidden_ND, places, grid), []
    full = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    deep_blocks = getattr(tower, "deepstack_visual_indexes", ())
    for index, block in enumerate(tower.blocks):
        allowed_NN = None
        if index not in full:  # windows of 2 x 2 groups, 4 x 4 patches, by true places
            windows = [(row // 4, col // 4) for row, col in places]
            allowed_NN = torch.tensor([[one == other for other in windows] for one in windows])
        attention, hidden_ND = attention_map(block, hidden_ND, places, allowed_NN)
        if index in blocks:
            weight_KG, kept = merging(attention, len(places) // 4, keep_ratio)
            corners = [weight_KG @ hidden_ND[corner::4] for corner in range(4)]
            hidden_ND = torch.stack(corners, 1).flatten(0, 1)
            deepstack = [weight_KG @ feature for feature in deepstack]
            places = [places[4 * n + corner] for n in kept for corner in range(4)]
        hidden_ND = hidden_ND + block.mlp(block.norm2(hidden_ND))
        if index in deep_blocks:
            deepstack.append(tower.deepstack_merger_list[deep_blocks.index(index)](hidden_ND))
    return tower.merger(hidden_ND), [(row // 2, col // 2) for row, col in places[::4]], deepstack


@torch.no_grad()
def test_towers_equal_the_slow_one_segment_by_segment(vlm, stock, pre):
    media = [pre.images([picture(56, 40)])[0], video(pre, 5, 24, 40), pre.images([picture(30, 90, 7)])[0]]
    family, tower = vlm.family, stock.model.visual
    for encoded, mm_item in zip(encode(vlm, media, plan(vlm, keep_ratio=0.7)), media, strict=True):
        grid = family.encoder.grid(mm_item)
        segments = tower.patch_embed(family.encoder.patches(mm_item)).chunk(grid.times)
        features, places, deepstacks = [], [], []
        for time, hidden_ND in enumerate(segments):
            feature, own, deepstack = slow_segment(tower, hidden_ND, grid, BLOCKS[family.model_type], 0.7)
            features.append(feature)
            deepstacks.append(deepstack)
            places += [(time, *place) for place in own]
        assert_close(encoded.feature_KD, torch.cat(features))
        assert len(encoded.deepstack) == len(deepstacks[0])
        for ours, theirs in zip(encoded.deepstack, zip(*deepstacks, strict=True), strict=True):
            assert_close(ours, torch.cat(theirs))
        assert encoded.coord_K3.tolist() == [list(place) for place in places]
        rows, cols = grid.rows // 2, grid.cols // 2
        assert encoded.placeholder_K.tolist() == [(t * rows + row) * cols + col for t, row, col in places]
        assert encoded.num_placeholders == grid.times * rows * cols
        assert encoded.num_patches == 4 * encoded.num_placeholders
        assert encoded.num_patches_kept == 4 * len(places)


def test_every_temporal_patch_keeps_tokens(vlm, pre):
    (encoded,) = encode(vlm, [video(pre, 8, 24, 40)], plan(vlm))
    times = encoded.coord_K3[:, 0].tolist()
    assert [times.count(time) for time in range(4)] == [count for _, count in encoded.frame_counts]
    assert set(times) == {0, 1, 2, 3}
    assert 0 < len(times) < encoded.num_placeholders


def test_scores_for_the_decoder_are_means_over_groups(vlm, pre):
    step = {"stage": "decoder_input", "reducer": {"kind": "illava", "keep_ratio": 0.5}}
    which = ReductionPlan(steps=[step])
    (encoded,) = encode(vlm, [video(pre, 4, 24, 40)], which)
    per_segment = encoded.score_K.view(2, -1)
    assert_close(per_segment.mean(1), torch.full((2,), 1 / (4 * per_segment.shape[1])))


# Traces, other reducers, plans that make no sense


def test_the_trace_leads_from_patches_to_vision_tokens(vlm, pre):
    media = [pre.images([picture(56, 40)])[0], video(pre, 3, 24, 40)]
    for encoded in encode(vlm, media, plan(vlm), trace=True):
        total = torch.eye(encoded.num_patches)
        for step in encoded.trace:
            total = step.matrix.to_dense() @ total
        assert_close(total.sum(1), torch.ones(len(encoded.placeholder_K)))
        assert torch.equal(encoded.trace[-1].coords[:, 1:], encoded.coord_K3)
        own = encoded.patch_coord_P4.clone()
        own[:, 2:] //= 2
        for row, place in zip(total, encoded.coord_K3.tolist(), strict=True):
            members = own[row > 0][:, 1:]
            assert (members[:, 0] == place[0]).all()  # nothing crosses from one temporal patch to another
            assert (members == torch.tensor(place)).all(1).sum() == 4  # the four patches of its own group
            assert len(set(row[row > 0].view(-1, 4)[0].tolist())) == 1


def test_a_picture_of_too_few_groups_is_left_whole_alone_and_in_a_batch(vlm, pre):
    """5 % of six groups are none; a batch with larger pictures would not object."""
    small, large = pre.images([picture(8, 16), picture(56, 40)])
    which = plan(vlm, keep_ratio=0.95)
    (alone,), (joint, reduced) = encode(vlm, [small], which), encode(vlm, [small, large], which)
    assert len(alone.placeholder_K) == len(joint.placeholder_K) == alone.num_placeholders
    assert_close(alone.feature_KD, joint.feature_KD)
    assert len(reduced.placeholder_K) < reduced.num_placeholders


def reducers_of_the_tower():
    for kind, reducer in REDUCERS.items():
        fields = reducer.model_fields
        if "vision_block" in reducer.stages:
            budget = {"keep_ratio": 0.5} if "keep_ratio" in fields else {}
            budget |= {"saliency": "attention_received"} if "saliency" in fields else {}
            yield kind, budget | ({"grid": [2, 2]} if kind == "pooling" else {})


TOWER_REDUCERS = dict(reducers_of_the_tower())


@pytest.mark.parametrize("kind", TOWER_REDUCERS)
def test_every_reducer_of_the_tower_works_on_whole_groups(vlm, pre, kind):
    reducer = {"kind": kind, **TOWER_REDUCERS[kind]}
    block = BLOCKS[vlm.family.model_type][0]
    which = ReductionPlan(steps=[{"stage": "vision_block", "layers": [block], "reducer": reducer}])
    if which.steps[0].reducer.evidence("vision_block") - VISION_EVIDENCE["vision_block"]:
        with pytest.raises(PlanError, match="not known in this tower"):
            vlm.family.check(which)
        return
    vlm.family.check(which)
    media = [pre.images([picture(56, 40)])[0], video(pre, 3, 24, 40)]
    for mm_item, encoded in zip(media, encode(vlm, media, which), strict=True):
        whole = mm_item.kind == "image" and REDUCERS[kind].merges_frames
        assert 0 < len(encoded.placeholder_K) <= encoded.num_placeholders
        assert (len(encoded.placeholder_K) == encoded.num_placeholders) == whole == bool(encoded.noop_steps)
        assert encoded.placeholder_K.tolist() == sorted(set(encoded.placeholder_K.tolist()))


def test_plans_that_make_no_sense_are_refused(vlm):
    released = ReductionPlan(layout="released", steps=plan(vlm).steps)
    beyond = ReductionPlan(
        steps=[{"stage": "vision_block", "layers": [30], "reducer": {"kind": "illava", "keep_ratio": 0.5}}]
    )
    for bad, words in ((released, "no square"), (beyond, r"blocks 0 to 5")):
        with pytest.raises(PlanError, match=words):
            vlm.family.check(bad)
    if vlm.family.model_type == "qwen2_5_vl":
        step = {"stage": "vision_block", "layers": [1, 2], "reducer": {"kind": "illava", "keep_ratio": 0.5}}
        with pytest.raises(PlanError, match=r"blocks \[2\], which attend within windows .* 1, 3, 5"):
            vlm.family.check(ReductionPlan(steps=[step]))
    for name in ("illava-qwen2-vl", "illava-qwen2.5-vl"):
        assert preset(name).layers("decoder_layer") == (6, 7, 8)

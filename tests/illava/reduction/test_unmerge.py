"""Unmerging against loops over cells, and through every family's tower: the grid is back, kept tokens unchanged."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.families.model_shape import load_model_shape
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.reduction.unmerge import Unmerging
from illava.token_counts import VisualShape, expected_counts
from illava.tokens import cluster, merge, prune
from tests.support.closeness import assert_close
from tests.support.models.cells import family_params
from tests.support.models.families import make_folder

pytestmark = pytest.mark.numeric

BLOCKS = {"llava_onevision": [2, 5], "llava_next": [1, 2], "qwen2_vl": [1, 3], "qwen2_5_vl": [1, 3], "qwen3_vl": [1, 3]}
BLOCKS |= {"qwen3_vl_moe": [1, 3], "qwen3_5": [1, 3], "internvl": [1, 3]}


def slow_restore(before, after, now, kept, *, lengths, num_neighbours):
    """Cell by cell, segment by segment."""
    out, near, start, first = [], [], 0, 0
    lengths, kept_lengths = lengths
    for n, k in zip(lengths, kept_lengths, strict=True):
        num = min(num_neighbours, k)
        for i in range(start, start + n):
            if i in kept:
                out.append(now[kept.index(i)])
                near.append({kept.index(i): 1.0})
                continue
            cosines = torch.cosine_similarity(before[i][None], after[first : first + k], dim=1).tolist()
            best = sorted(range(k), key=lambda j: -cosines[j])[:num]
            moved = sum(now[first + j] - after[first + j] for j in best) / num
            out.append(before[i] + moved)
            near.append({first + j: 1 / num for j in best})
        start, first = start + n, first + k
    matrix = torch.zeros(len(before), len(after))
    for row, members in enumerate(near):
        for column, weight in members.items():
            matrix[row, column] = weight
    return torch.stack(out), matrix


@pytest.mark.parametrize(("side", "num_neighbours"), [(1, 1), (1, 3), (2, 4)])
def test_two_steps_are_undone_last_first(side, num_neighbours):
    gen, size = torch.Generator().manual_seed(3), side**2
    x = torch.randn(12 * size, 6, generator=gen)
    into = torch.tensor([0, 1, 1, 3, 4, 0, 6, 7, 8, 8, 10, 11])
    first = cluster(into, torch.ones(12), (7, 5), (5, 4))
    second = prune(torch.tensor([0, 2, 3, 5, 8]), (3, 2), 9)
    y = merge(first, x.view(12, -1))
    y2 = y + torch.randn(y.shape, generator=gen)
    z = merge(second, y2)
    now = z + torch.randn(z.shape, generator=gen)
    unmerging, near = Unmerging(num_neighbours, side), {"num_neighbours": num_neighbours}
    unmerging.add(first, (7, 5), x, y.view(-1, 6))
    unmerging.add(second, (5, 4), y2.view(-1, 6), z.view(-1, 6))
    half, later = slow_restore(y2, z, now, second.kept_K.tolist(), lengths=((5, 4), (3, 2)), **near)
    whole, early = slow_restore(x.view(12, -1), y, half, first.kept_K.tolist(), lengths=((7, 5), (5, 4)), **near)
    assert_close(unmerging.restore(now.view(-1, 6)), whole.view(-1, 6))
    by_group = torch.kron(early @ later, torch.eye(size))
    assert_close(unmerging.matrix().to_dense(), by_group)
    assert_close(unmerging.matrix().to_dense().sum(1), torch.ones(12 * size))


def test_what_has_not_changed_since_is_what_it_was():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(4))
    kept = prune(torch.tensor([0, 3, 4]), (3,), 9)
    unmerging = Unmerging(2, 1)
    unmerging.add(kept, (9,), x, x[kept.kept_K])
    assert_close(unmerging.restore(x[kept.kept_K]), x)
    place = torch.arange(3)
    assert torch.equal(unmerging.followed(place)[kept.kept_K], place)


@pytest.fixture(scope="module", params=family_params())
def loaded(request, tmp_path_factory):
    folder = str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))
    return VLM.from_pretrained(folder, kv_cache_bytes=8 << 20), load_preprocessor(folder), folder


def plan_of(vlm, *others, unmerge=True, kind="illava"):
    step = {
        "stage": "vision_block",
        "layers": BLOCKS[vlm.family.model_type],
        "reducer": {"kind": kind, "keep_ratio": 0.7},
    }
    return ReductionPlan.model_validate(
        {"unmerge": {"num_neighbours": 3} if unmerge else None, "steps": [step, *others]}
    )


def media_of(vlm, pre):
    rng = np.random.default_rng(8)
    image = pre.images([rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)])[0]
    if vlm.family.model_type == "llava_next":
        return [image]
    return [image, pre.video([rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(4)])]


@torch.inference_mode()
def test_the_whole_grid_is_back_and_kept_tokens_are_as_they_were(loaded):
    vlm, pre, _ = loaded
    media = media_of(vlm, pre)
    plan = plan_of(vlm)
    vlm.family.check(plan)
    whole, reduced, restored = (
        vlm.family.encode(media, which, trace=True) for which in (EMPTY_PLAN, plan_of(vlm, unmerge=False), plan)
    )
    for full, few, back in zip(whole, reduced, restored, strict=True):
        assert torch.equal(back.placeholder_K, full.placeholder_K)
        assert torch.equal(back.coord_K3, full.coord_K3)
        assert back.frame_counts == full.frame_counts
        assert not torch.allclose(back.feature_KD, full.feature_KD)
        if len(few.placeholder_K) < len(full.placeholder_K) and vlm.family.model_type.startswith("qwen"):
            assert_close(back.feature_KD[few.placeholder_K], few.feature_KD)
        assert [len(layer) for layer in back.deepstack] == [len(layer) for layer in full.deepstack]
        matrices = [step.matrix for step in back.trace]
        assert [step.stage for step in back.trace] == ["vision_block", "vision_block", "unmerge", "layout"]
        assert all(a.shape[0] == b.shape[1] for a, b in pairwise(matrices))


def test_the_rows_counts_are_the_whole_grids_again(loaded):
    vlm, pre, folder = loaded
    shape = load_model_shape(folder)
    again = {"stage": "vision_output", "reducer": {"kind": "tome", "keep_ratio": 0.6}}
    kinds = [VisualShape("image", 48, 40), VisualShape("video", 40, 40, 4)]
    for plan in (plan_of(vlm), plan_of(vlm, again)):
        media = media_of(vlm, pre)
        sampling = SamplingParams(max_new_tokens=2, min_new_tokens=2)
        requests = [Request(str(n), (mm_item, "Go"), sampling, trace=True) for n, mm_item in enumerate(media)]
        together = vlm.generate(requests, plan=plan)
        for request, kind, done in zip(requests, kinds, together, strict=False):
            (alone,) = vlm.generate([request], plan=plan)
            assert done.error is None
            assert (done.usage, done.token_ids) == (alone.usage, alone.token_ids)
            given = {"num_vision_blocks": shape.num_vision_blocks, "num_decoder_layers": shape.num_decoder_layers}
            counts = expected_counts(shape.geometry, plan, [kind], **given)
            if counts.exact:
                assert counts.num_vision_tokens_kept == done.usage.num_vision_tokens_kept
            if len(plan.steps) == 1:
                assert done.usage.num_vision_tokens_kept == done.usage.num_vision_tokens
            assert done.trace.matrix().shape[1] == done.usage.num_patches

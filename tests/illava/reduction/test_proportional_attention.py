"""ToMe's proportional attention: a merged token weighs as much as what it stands for, exactly, in every tower."""

from __future__ import annotations

import pytest
import torch

from illava import VLM
from illava.attention.packed import chunk_attention, packed_attention, with_key_bias
from illava.attention.scores import attention_received, one_query_attention
from illava.families.qwen.blocks import NativeTower
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.reducers import REDUCERS
from illava.reduction.grid_representatives import merged_counts
from illava.reduction.segments import Segments
from illava.reduction.vision import VisionReduction
from tests.support.closeness import FLOAT32, assert_close
from tests.support.models.cells import family_params
from tests.support.models.families import make_folder

pytestmark = pytest.mark.numeric

BLOCK = 1
LENGTHS = (5, 9, 9, 2)


def slow_attention(q, k, v, bias, scale):
    """One head of one segment, entry by entry."""
    logits = torch.stack([torch.stack([scale * (qi @ kj) + b for kj, b in zip(k, bias, strict=True)]) for qi in q])
    attention = logits.softmax(1)
    return attention @ v, attention


@pytest.mark.parametrize("width", [8, 12, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_in_extra_width_is_a_bias_on_the_scores(width, dtype):
    gen, scale = torch.Generator().manual_seed(1), width**-0.5
    q, k, v = (torch.randn(sum(LENGTHS), 2, width, generator=gen).to(dtype) for _ in range(3))
    size = torch.randint(1, 200, (sum(LENGTHS),), generator=gen).float()
    bias = size.log()
    mixed = packed_attention(q, k, v, LENGTHS, causal=False, scale=scale, key_bias_T=bias)
    assert mixed.shape == v.shape
    received = attention_received(q, k, LENGTHS, scale=scale, key_bias_T=bias)
    first = one_query_attention(q, k, LENGTHS, query=0, scale=scale, key_bias_T=bias)
    parts = zip(
        *(x.split(LENGTHS) for x in (q.float(), k.float(), v.float(), bias, mixed, received, first)), strict=True
    )
    # in bfloat16 the extra width holds the bias in 8 bits a piece, and the mixture is rounded to as many
    loose, tight = (FLOAT32, FLOAT32) if dtype == torch.float32 else (3e-2, 1e-3)
    for q_n, k_n, v_n, bias_n, mixed_n, received_n, first_n in parts:
        by_head = [slow_attention(q_n[:, h], k_n[:, h], v_n[:, h], bias_n, scale) for h in range(2)]
        assert_close(mixed_n.float(), torch.stack([out for out, _ in by_head], 1), tolerance=loose)
        attention = torch.stack([a for _, a in by_head])
        assert_close(received_n, attention.mean((0, 1)), tolerance=tight)
        assert_close(first_n, attention[:, 0].mean(0), tolerance=tight)
    wide_q, wide_k = with_key_bias(q, k, bias, scale=scale)  # what CUDA's kernels are given
    assert wide_q.shape == wide_k.shape
    assert wide_k.shape[-1] % 8 == 0
    wide_v = torch.nn.functional.pad(v, (0, wide_k.shape[-1] - width))
    wide_mixed = packed_attention(wide_q, wide_k, wide_v, LENGTHS, causal=False, scale=scale)[..., :width]
    assert_close(wide_mixed.float(), mixed.float(), tolerance=loose)


@pytest.mark.parametrize("heads", [2, 6], ids=["a head each", "three share a key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_bias_is_a_bias_on_the_scores_whole_and_by_chunks(dtype, heads):
    """Segments of one length, of others, and of none; the last queries of each, over keys that were there before."""
    lengths, new, gen = (9, 9, 0, 5, 1), (2, 9, 0, 3, 1), torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(sum(lengths), n, 12, generator=gen).to(dtype) for n in (heads, 2, 2))
    bias = torch.randint(1, 200, (sum(lengths),), generator=gen).float().log()
    mixed = packed_attention(q, k, v, lengths, causal=True, scale=0.3, key_bias_T=bias)
    last = [x[len(x) - n :] for x, n in zip(q.split(lengths), new, strict=True)]
    chunk = chunk_attention(torch.cat(last), k, v, new, lengths, scale=0.3, key_bias_U=bias)
    tolerance = FLOAT32 if dtype == torch.float32 else 2**-7  # one rounding of the mixture, and of its weights
    parts = zip(*(x.split(lengths) for x in (q.float(), k.float(), v.float(), bias, mixed)), strict=True)
    for (q_n, k_n, v_n, bias_n, mixed_n), chunk_n in zip(parts, chunk.split(new), strict=True):
        if not len(q_n):
            continue
        logits = torch.einsum("qhd,khd->hqk", q_n, k_n.repeat_interleave(heads // 2, 1)) * 0.3 + bias_n
        logits = logits.masked_fill(torch.ones(logits.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        slow = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v_n.repeat_interleave(heads // 2, 1))
        assert_close(mixed_n.float(), slow, tolerance=tolerance)
        assert_close(chunk_n.float(), slow[len(slow) - len(chunk_n) :], tolerance=tolerance)


BUDGETS = {"pooling": {"grid": (3, 2)}, "frame_merging": {"num_frames": 2}}
OPTIONAL = [kind for kind, reducer in REDUCERS.items() if "proportional_attention" in reducer.model_fields]


@pytest.mark.parametrize("kind", OPTIONAL)
def test_every_merging_method_biases_by_how_much_it_merged_where_asked_to(kind):
    """Two steps; the option of the first holds for the second, too. Without it there is no bias."""
    gen, lengths = torch.Generator().manual_seed(3), (24, 24)
    coord_T3 = torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(4))
    hidden_TD, q_THd, k_THd = (torch.randn(48, *shape, generator=gen) for shape in ((16,), (2, 8), (2, 8)))
    budget, biases = BUDGETS.get(kind, {"keep_ratio": 0.6}), {}
    for proportional in (True, False):
        reducer = {"kind": kind, **budget, "proportional_attention": proportional}
        steps = [{"stage": "vision_block", "layers": [0], "reducer": reducer}]
        steps += [{"stage": "vision_block", "layers": [1], "reducer": {"kind": "tome", "num_merged": 1}}]
        plan, video = ReductionPlan(steps=steps), Segments.of([2], [True])
        reduction = VisionReduction(plan, lengths, coord_T3, num_blocks=2, seeds=[0, 0], segments=video)
        kept_KD = reduction.at(0, hidden_TD, q_THd, k_THd, scale=0.3)
        n = len(kept_KD)
        reduction.at(1, kept_KD, q_THd[:n], k_THd[:n], scale=0.3)
        biases[proportional] = reduction.key_bias_T
        sizes = merged_counts(
            [step.assignment for step in reduction.steps], 48, sum(reduction.lengths), hidden_TD.device
        )
    assert biases[False] is None
    assert sizes.sum() == 48 or kind == "illava_2026"  # which drops some tokens
    assert sizes.max() > 1
    assert_close(biases[True], sizes.log())


def test_the_published_methods_stay_as_published():
    plain = {kind for kind in OPTIONAL if not REDUCERS[kind](**BUDGETS.get(kind, {"keep_ratio": 0.6})).biases_attention}
    assert plain == {*OPTIONAL} - {"ward"}
    assert {"illava", "illava_2026", "tome", "kmeans", "greedy", "pooling"} <= plain


@pytest.fixture(scope="module", params=family_params())
def family(request, tmp_path_factory):
    folder = str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))
    return VLM.from_pretrained(folder, kv_cache_bytes=8 << 20).family


def feature_of(ran):
    return ran[0] if isinstance(ran, tuple) else ran


@pytest.mark.parametrize("kind", ["tome", "greedy"])
@torch.inference_mode()
def test_equal_tokens_merged_are_as_if_they_were_all_there(family, kind, monkeypatch):
    """Twins at one place: what is merged of them attends and is attended as both did, in every later block."""
    monkeypatch.setattr("illava.families.llava.towers._CPU_ROWS", 1)  # segment by segment
    tower, width = family.tower, _width(family)
    has_cls, side = getattr(tower, "has_cls", False), 2 if isinstance(tower, NativeTower) else 1
    gen, twins, size = torch.Generator().manual_seed(2), 8, side**2
    corners = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    cells = torch.stack([torch.arange(twins) // 4, torch.arange(twins) % 4], 1).repeat_interleave(2, 0)
    place = (cells[:, None] * side + corners).flatten(0, 1)
    one = torch.randn(2, twins, size, width, generator=gen).repeat_interleave(2, 1).flatten(1, 2)
    lengths = (2 * twins * size,) * 2
    coord_T3 = torch.cat([torch.cat([torch.full((len(place), 1), n), place], 1) for n in range(2)])
    if has_cls:
        one = torch.cat([torch.randn(2, 1, width, generator=gen), one], 1)
    hidden = one.flatten(0, 1)
    blocks = num_blocks = family.num_vision_blocks

    def run(plan):
        reduction = VisionReduction(plan, lengths, coord_T3, num_blocks=num_blocks, has_cls=has_cls, group_side=side)
        return feature_of(tower.run(hidden, reduction)), reduction

    def cut(proportional):
        reducer = {"kind": kind, "num_merged": 3, "proportional_attention": proportional}
        return ReductionPlan(steps=[{"stage": "vision_block", "layers": [BLOCK], "reducer": reducer}])

    assert blocks > BLOCK
    whole, _ = run(EMPTY_PLAN)
    merged, reduction = run(cut(True))
    kept_K = reduction.steps[0].of_groups.kept_K
    assert len(kept_K) == 2 * (2 * twins - 3)
    assert reduction.key_bias_T.exp().max().round() == 2
    assert_close(merged, whole[kept_K])
    plain, _ = run(cut(False))
    assert (plain - whole[kept_K]).abs().max() > 1e-3


def _width(family):
    block = family.tower._blocks[0]
    names = ("layer_norm1", "layernorm_before", "norm1")
    norm = next(getattr(block, name) for name in names if hasattr(block, name))
    return norm.weight.shape[0]

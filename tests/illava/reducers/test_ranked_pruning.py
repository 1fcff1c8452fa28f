"""Attention pruning, FastV, random and uniform stride against sorting by hand."""

from __future__ import annotations

import pytest
import torch

from illava.plan import ReductionPlan
from illava.reducers import AttentionPruning, FastV, PyramidDrop, Random, UniformStride
from tests.support.reducer_cases import assign_each, kept_places, ragged, segments


def slow_keep(scores: list[float], num_kept: int) -> list[int]:
    """Drop the lowest one by one; of equal ones the last."""
    left = list(range(len(scores)))
    while len(left) > num_kept:
        lowest = min(scores[i] for i in left)
        left.remove(max(i for i in left if scores[i] == lowest))
    return left


@pytest.mark.parametrize(
    ("reducer", "stage", "field"),
    [
        (AttentionPruning(keep_ratio=0.6), "vision_block", "attention_received_T"),
        (AttentionPruning(num_merged=3), "decoder_input", "attention_received_T"),
        (AttentionPruning(num_merged=3), "decoder_layer", "attention_received_T"),
        (
            AttentionPruning(num_merged=3, score="causal_normalised"),
            "decoder_layer",
            "causal_normalised_attention_T",
        ),
        (AttentionPruning(num_merged=3, score="released"), "decoder_layer", "last_query_attention_T"),
        (AttentionPruning(num_merged=3, score="released"), "vision_block", "attention_received_T"),
        (FastV(keep_ratio=0.5), "decoder_layer", "last_query_attention_T"),
    ],
)
def test_the_lowest_scores_go(reducer, stage, field):
    tokens, evidence = ragged(20)
    getattr(evidence, field)[3:9] = 0.5  # ties
    blocks = assign_each(reducer, tokens, evidence, stage)
    for block, (own_tokens, own_evidence) in zip(blocks, segments(tokens, evidence), strict=True):
        (n,) = own_tokens.lengths
        assert kept_places(block) == slow_keep(getattr(own_evidence, field).tolist(), reducer.num_kept(n))


def test_random_draws_every_token_about_equally_often():
    tokens, evidence = ragged(21, ((1, 4, 5),))
    counts = torch.zeros(20)
    for seed in range(400):
        object.__setattr__(evidence, "seeds", (seed,))
        counts[Random(keep_ratio=0.5).assign(tokens, evidence, "vision_block").kept_K] += 1
    assert ((counts - 200).abs() < 50).all()  # five standard deviations


def test_uniform_stride_centres_its_steps():
    tokens, evidence = ragged(22, ((1, 1, 9), (1, 1, 10), (1, 1, 1)))
    blocks = assign_each(UniformStride(keep_ratio=0.34), tokens, evidence, "vision_block")
    assert [kept_places(b) for b in blocks] == [[1, 4, 7], [1, 5, 8], [0]]
    for n in range(1, 40):
        for k in range(1, n + 1):
            tokens, evidence = ragged(0, ((1, 1, n),))
            kept = UniformStride(keep_per_frame=k).assign(tokens, evidence, "vision_block").kept_K.tolist()
            assert kept == [int((i + 0.5) * n / k + 1e-9) for i in range(k)]


def test_pyramiddrop_is_fastv_at_several_layers():
    step = {"stage": "decoder_layer", "layers": [8, 16, 24], "reducer": {"kind": "fastv", "keep_ratio": 0.5}}
    plan = ReductionPlan.model_validate({"steps": [step]})
    reducer, counts = plan.at("decoder_layer", 16), [576]
    for _ in plan.layers("decoder_layer"):
        counts.append(reducer.num_kept(counts[-1]))
    assert counts == [576, 288, 144, 72]
    assert reducer.per == "prompt"


def test_pyramiddrop_keeps_the_share_that_the_running_layer_looks_at():
    tokens, evidence = ragged(35)
    kept_K = PyramidDrop(keep_ratio=0.3).assign(tokens, evidence, "decoder_layer").kept_K.tolist()
    expected, start = [], 0
    for n in tokens.lengths:
        score = evidence.own_layer_query_attention_T[start : start + n].tolist()
        best = sorted(range(n), key=lambda j: -score[j])[: max(round(0.3 * n), 1)]
        expected += [start + j for j in sorted(best)]
        start += n
    assert kept_K == expected

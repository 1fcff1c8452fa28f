"""Scores against the plain formula with the whole map in memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from illava.attention.scores import attention_received, causal_attention_received, last_query_attention
from tests.support.closeness import assert_close

pytestmark = pytest.mark.numeric

HEADS, WIDTH = 4, 6
SCALE = WIDTH**-0.5


def _qk(num_tokens: int, *, key_heads: int = HEADS, seed: int = 0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(num_tokens, HEADS, WIDTH, generator=draw) * 2
    k = torch.randn(num_tokens, key_heads, WIDTH, generator=draw) * 2
    return q.to(dtype), k.to(dtype)


def _map(q, k, *, causal: bool) -> torch.Tensor:
    """[H, N, N] post-softmax attention of one segment, float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * SCALE
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[1:]).triu(1).bool(), -math.inf)
    return logits.softmax(-1)


def _plain_causal(q, k, scope, *, normalised: bool) -> torch.Tensor:
    attention = _map(q, k, causal=True).mean(0)
    score = torch.zeros(len(scope), dtype=torch.float64)
    for j, s in enumerate(scope):
        members = [i for i, t in enumerate(scope) if t == s and s >= 0]
        received = sum(attention[i, j] for i in members if i >= j)
        bias = sum(1 / (i + 1) for i in members if i >= j)
        if members:
            score[j] = received / (bias if normalised else len(members))
    return score


class LargestOutput(TorchDispatchMode):
    """Records the largest number of elements any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5), (4, 9, 4, 1), (300, 300), (257, 513)])
def test_attention_received_is_the_column_mean_of_the_map(lengths):
    q, k = _qk(sum(lengths))
    got = attention_received(q, k, lengths, scale=SCALE)
    parts = zip(q.split(lengths), k.split(lengths), strict=True)
    expected = torch.cat([_map(qs, ks, causal=False).mean((0, 1)) for qs, ks in parts])
    assert got.dtype == torch.float32
    assert_close(got.double(), expected)
    sums = torch.stack([part.sum() for part in got.split(lengths)])
    assert_close(sums, torch.ones(len(lengths)))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (4, 300, 4, 1)])
def test_scores_that_begin_with_the_attention_s_log_sum_exps_are_the_same(lengths, biased):
    q, k = _qk(sum(lengths))
    bias = torch.linspace(0, 2, sum(lengths)) if biased else torch.zeros(sum(lengths))
    parts = zip(q.split(lengths), k.split(lengths), bias.split(lengths), strict=True)
    maps = [torch.einsum("ihd,jhd->hij", qs.double(), ks.double()) * SCALE + bs.double() for qs, ks, bs in parts]
    lse_HT = torch.cat([part.logsumexp(-1) for part in maps], 1).float()
    kwargs = {"scale": SCALE, "key_bias_T": bias if biased else None}
    got = attention_received(q, k, lengths, **kwargs, lse_HT=lse_HT)
    assert_close(got, attention_received(q, k, lengths, **kwargs))
    # it is the given ones that count: a log-sum-exp that is larger by log 2 halves what the query gives
    assert_close(attention_received(q, k, lengths, **kwargs, lse_HT=lse_HT + math.log(2)), got / 2)


def test_low_precision_inputs_are_scored_in_float32():
    q, k = _qk(50, dtype=torch.bfloat16)
    expected = _map(q, k, causal=False).mean((0, 1))
    assert_close(attention_received(q, k, (50,), scale=SCALE).double(), expected)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_causal_attention_counts_only_queries_of_the_own_scope(normalised, key_heads):
    lengths = (23, 9, 310)
    q, k = _qk(sum(lengths), key_heads=key_heads)
    scope = [-1] * 3 + [0] * 8 + [-1] * 2 + [0] * 4 + [1] * 4 + [-1] * 2
    scope += [2] * 9
    scope += [-1] * 10 + [3] * 100 + [4] * 190 + [-1] * 10
    got = causal_attention_received(q, k, lengths, torch.tensor(scope), scale=SCALE, normalised=normalised)
    start, expected = 0, []
    for n in lengths:
        part = slice(start, start + n)
        expected.append(_plain_causal(q[part], k[part], scope[part], normalised=normalised))
        start += n
    assert_close(got.double(), torch.cat(expected))


def test_flat_attention_gives_a_constant_normalised_score_but_not_a_constant_plain_one():
    q, k = torch.zeros(600, HEADS, WIDTH), torch.zeros(600, 2, WIDTH)
    scope = torch.tensor([-1] * 20 + [0] * 560 + [-1] * 20)
    score = causal_attention_received(q, k, (600,), scope, scale=SCALE, normalised=True)
    assert_close(score[20:580], torch.ones(560))
    assert score[:20].eq(0).all()
    assert score[580:].eq(0).all()
    plain = causal_attention_received(q, k, (600,), scope, scale=SCALE, normalised=False)
    assert plain[20] > 50 * plain[579]


def test_last_query_attention_is_the_last_row_of_the_map():
    lengths = (6, 1, 40)
    q, k = _qk(sum(lengths), key_heads=2)
    got = last_query_attention(q, k, lengths, scale=SCALE)
    parts = zip(q.split(lengths), k.split(lengths), strict=True)
    expected = torch.cat([_map(qs, ks, causal=True)[:, -1].mean(0) for qs, ks in parts])
    assert_close(got.double(), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_no_operation_returns_as_much_as_one_n_by_n_map(causal):
    num_tokens = 729
    q, k = _qk(num_tokens)
    with LargestOutput() as seen:
        if causal:
            scope = torch.zeros(num_tokens, dtype=torch.long)
            causal_attention_received(q, k, (num_tokens,), scope, scale=SCALE, normalised=True)
        else:
            attention_received(q, k, (num_tokens,), scale=SCALE)
    assert 0 < seen.numel < num_tokens**2

"""Attention in bfloat16 as two products and a softmax equals an oracle in float64, within what rounded scores allow."""

from __future__ import annotations

import pytest
import torch

from illava.attention import bfloat16_cpu
from illava.attention.packed import packed_attention
from tests.support.processors import pretend_processor

if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    pytest.skip("torch has no bfloat16 products of oneDNN on this processor", allow_module_level=True)

# Keys, scores, shares and sums are rounded to 8 bits each. Scores of up to 4 are off by 2^-7, and so is a share in its
# own size; over hundreds of keys the errors of an output average, which leaves about 1 % of its spread.
MOST_RMS = 0.02


@pytest.fixture(autouse=True)
def _native(monkeypatch, tmp_path):
    pretend_processor(monkeypatch, tmp_path, native_bfloat16=True)
    with torch.inference_mode():
        yield


def drawn(num_tokens, heads, groups, width, shift=0.0):
    draw = torch.Generator().manual_seed(num_tokens)
    q, k, v = (torch.randn(num_tokens, n, width, generator=draw) for n in (heads, groups, groups))
    return q.bfloat16(), (k + shift).bfloat16(), v.bfloat16()


def oracle(q, k, v, *, causal, scale):
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    score = q @ k.transpose(1, 2) * scale
    if causal:
        score = score.masked_fill(torch.ones(score.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return (score.softmax(-1) @ v).transpose(0, 1)


def relative_rms(got, expected):
    return float((got.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scores", [1 << 21, 1 << 15])
def test_every_block_is_right(monkeypatch, causal, heads, groups, scores):
    """The smaller room makes blocks of queries and of single heads, with a remainder of each."""
    monkeypatch.setattr(bfloat16_cpu, "_SCORES", scores)
    monkeypatch.setattr(bfloat16_cpu, "_FEWEST_QUERIES", 48)
    monkeypatch.setattr(bfloat16_cpu, "_CAUSAL_QUERIES", 100)
    lengths = (130, 257, 130)
    q, k, v = drawn(sum(lengths), heads, groups, 24)
    assert bfloat16_cpu.serves(q, lengths)
    got = packed_attention(q, k, v, lengths, causal=causal, scale=0.2)
    parts = zip(*(x.split(lengths) for x in (got, q, k, v)), strict=True)
    for own, *inputs in parts:
        assert relative_rms(own, oracle(*inputs, causal=causal, scale=0.2)) < MOST_RMS


def test_keys_that_share_a_large_part_lose_nothing():
    """Their scores are near 100, where bfloat16 has steps of 0.5; the softmax sees their differences alone."""
    q, k, v = drawn(200, 2, 2, 64, shift=12.0)
    q = q.abs()
    got = packed_attention(q, k, v, (200,), causal=False, scale=0.125)
    assert relative_rms(got, oracle(q, k, v, causal=False, scale=0.125)) < MOST_RMS


def test_short_segments_and_other_processors_keep_torchs_kernel(monkeypatch, tmp_path):
    q, _, _ = drawn(200, 2, 2, 64)
    assert not bfloat16_cpu.serves(q, (100, 100))
    assert not bfloat16_cpu.serves(q.float(), (200,))
    pretend_processor(monkeypatch, tmp_path, native_bfloat16=False)
    assert not bfloat16_cpu.serves(q, (200,))

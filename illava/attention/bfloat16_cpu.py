"""Computes attention in bfloat16 on CPUs with native bfloat16 products, as two products and a softmax in the cache.

torch's fused kernel multiplies such small blocks of bfloat16 at a third of the rate that whole products reach. Here a
few heads are computed at a time, so that their scores stay in the cache. Scores are rounded to bfloat16 before the
softmax, as in eager attention; a softmax is the same for scores shifted alike, so each key is taken without the mean of
the keys, which makes them and their rounding errors small.

Shape suffixes: T tokens of all segments, N tokens of a segment, H query heads, G key/value heads, d head width,
h heads computed together, R queries computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from illava.devices import has_native_bfloat16

_SCORES = 1 << 21  # entries at a time, 4 MiB: they and their softmax stay in the last cache
_FEWEST_TOKENS = 128  # below, calls cost more than products
_FEWEST_QUERIES = 256
_CAUSAL_QUERIES = 256  # a block of queries computes scores of keys that it must not see; half a block on average


def serves(q_THd: Tensor, lengths: Sequence[int]) -> bool:
    """Whether segments of these lengths are attended here."""
    if q_THd.dtype != torch.bfloat16 or q_THd.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return min(lengths) >= _FEWEST_TOKENS and has_native_bfloat16()


def attend(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, lengths: Sequence[int], *, causal: bool, scale: float
) -> Tensor:
    """Attention within each segment: [T, H, d]; no segment depends on another."""
    out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
    room = q_THd.new_empty(2, max(_room(q_THd, k_TGd, length, causal=causal) for length in set(lengths)))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        _segment(q_THd[part], k_TGd[part], v_TGd[part], out_THd[part], room, causal=causal, scale=scale)
        start += length
    return out_THd


def _block(num_tokens: int, num_heads: int, share: int, *, causal: bool) -> tuple[int, int]:
    """Queries and heads that are computed together; heads that share a key head always are."""
    most = max(_FEWEST_QUERIES, _SCORES // (num_tokens * share))
    rows = min(num_tokens, _CAUSAL_QUERIES if causal else most)
    if share > 1:
        return rows, share
    return rows, min(num_heads, max(1, _SCORES // (rows * num_tokens)))


def _room(q_THd: Tensor, k_TGd: Tensor, num_tokens: int, *, causal: bool) -> int:
    """Scores of the largest block."""
    rows, together = _block(num_tokens, q_THd.shape[1], q_THd.shape[1] // k_TGd.shape[1], causal=causal)
    return rows * together * num_tokens


def _segment(
    q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, out_NHd: Tensor, room: Tensor, *, causal: bool, scale: float
) -> None:
    num_tokens, num_heads, _ = q_NHd.shape
    share = num_heads // k_NGd.shape[1]
    rows, together = _block(num_tokens, num_heads, share, causal=causal)
    q_HNd, v_GNd = q_NHd.transpose(0, 1), v_NGd.transpose(0, 1)
    k_GdN = _centred(k_NGd, scale).permute(1, 2, 0)
    for head in range(0, num_heads, together):
        q_hNd, k_hdN, v_hNd = q_HNd[head : head + together], k_GdN[head // share :], v_GNd[head // share :]
        if share == 1:
            k_hdN, v_hNd = k_hdN[: len(q_hNd)], v_hNd[: len(q_hNd)]
        else:
            k_hdN, v_hNd = (x[:1].expand(share, -1, -1) for x in (k_hdN, v_hNd))
        for first in range(0, num_tokens, rows):
            stop = min(first + rows, num_tokens)
            seen = stop if causal else num_tokens
            shape = (len(q_hNd), stop - first, seen)
            score_hRN, share_hRN = (part[: shape[0] * shape[1] * shape[2]].view(shape) for part in room)
            torch.bmm(q_hNd[:, first:stop], k_hdN[:, :, :seen], out=score_hRN)
            if causal:
                score_hRN[:, :, first:].masked_fill_(_later(stop - first), float("-inf"))
            torch.softmax(score_hRN, -1, out=share_hRN)
            out_NHd[first:stop, head : head + together] = torch.bmm(share_hRN, v_hNd[:, :seen]).transpose(0, 1)


def _centred(k_NGd: Tensor, scale: float) -> Tensor:
    """Keys without their mean, scaled, rounded once."""
    wide_NGd = k_NGd.float()
    return wide_NGd.sub_(wide_NGd.mean(0, keepdim=True)).mul_(scale).to(k_NGd.dtype)


@lru_cache(maxsize=8)
def _later(num: int) -> Tensor:
    """Whether key c of a block lies behind query r: [num, num]."""
    with torch.inference_mode(False):
        return torch.ones(num, num, dtype=torch.bool).triu(1)

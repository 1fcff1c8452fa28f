"""Computes attention with a bias on each key on CPU, where SDPA takes it as a mask of one row for all queries.

As extra channels of queries and keys (`illava.attention.packed.with_key_bias`, for kernels that take no bias) it costs
a CPU a third to a half of the attention, mostly copies; as a mask it costs 2 to 4 per cent.

Shape suffixes: T tokens packed end to end, C queries, U keys, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_MASKED_QUERIES = 512  # bounds the mask of a long chunk: 512 x keys


def biased_attention(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    lengths: tuple[int, ...],
    key_bias_T: Tensor,
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """`illava.attention.packed.packed_attention` with a bias: one call for neighbouring segments of one length."""
    outputs, start = [], 0
    for length, group in groupby(lengths):
        num_segments = len(list(group))
        stop = start + num_segments * length
        q, k, v = (
            x[start:stop].view(num_segments, length, x.shape[1], x.shape[2]).transpose(1, 2)
            for x in (q_THd, k_TGd, v_TGd)
        )
        bias = key_bias_T[start:stop].float().view(num_segments, 1, 1, length)
        if causal and length:
            # what SDPA calls there: it takes both masks together, which SDPA itself lets nobody give it
            out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, True, attn_mask=bias, scale=scale
            )[0]
        else:
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(out.transpose(1, 2).reshape(stop - start, *q_THd.shape[1:]))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def biased_chunks(
    q_CHd: Tensor,
    k_UGd: Tensor,
    v_UGd: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    *,
    key_bias_U: Tensor,
    scale: float,
) -> Tensor:
    """`illava.attention.packed.chunk_attention` with a bias, a block of queries at a time."""
    outputs = []
    parts = zip(*(x.split(key_lengths) for x in (k_UGd, v_UGd, key_bias_U.float())), strict=True)
    for q, (k, v, bias) in zip(q_CHd.split(lengths), parts, strict=True):
        num_before = len(k) - len(q)
        for start in range(0, len(q), _MASKED_QUERIES):
            stop = min(start + _MASKED_QUERIES, len(q))
            seen = num_before + stop
            later = torch.ones(stop - start, seen, dtype=torch.bool).triu(num_before + start + 1)
            mask = bias[:seen].expand_as(later).masked_fill(later, float("-inf"))
            own_q, own_k, own_v = (x.transpose(0, 1)[None] for x in (q[start:stop], k[:seen], v[:seen]))
            out = scaled_dot_product_attention(
                own_q, own_k, own_v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)

"""Computes attention with a bias on each key on CPU, where SDPA takes it as a mask of one row for all queries.

As extra channels of queries and keys (`illava.attention.packed.with_key_bias`, for kernels that take no bias) it costs
a CPU a third to a half of the attention, mostly copies; as a mask it costs 2 to 4 per cent.

Shape suffixes: T tokens packed end to end, C queries, U keys, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from illava.attention.segments import of_one_length, packed_again, query_blocks


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
    outputs = []
    for part, (q, k, v) in of_one_length(lengths, q_THd, k_TGd, v_TGd):
        bias = key_bias_T[part].float().view(len(q), 1, 1, q.shape[2])
        if causal and q.shape[2]:
            # what SDPA calls there: it takes both masks together, which SDPA itself lets nobody give it
            out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, True, attn_mask=bias, scale=scale
            )[0]
        else:
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        outputs.append(packed_again(out))
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
        for own_q, (own_k, own_v), sees in query_blocks(q, k, v):
            mask = bias[: sees.shape[1]].expand_as(sees).masked_fill(~sees, float("-inf"))
            out = scaled_dot_product_attention(
                own_q, own_k, own_v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)

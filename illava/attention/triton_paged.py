"""Computes paged decode attention in Triton: one query a request over its blocks, split over keys, summed in float32.

The kernel cuts every request's keys into `_NUM_SPLITS` splits by that request's length alone. So the launch has one
shape whatever the lengths (a captured graph may replay it), and a row's result does not depend on its batch. The query
heads that share a key head are one tile: each key is read once. `illava.attention.paged` is the reference.

Shape suffixes: B requests, H query heads, G key/value heads, d head width, P blocks of the pool, S slots of a block, M
blocks of a table, C splits; in kernels N keys of a tile and H the query heads of one key head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUM_SPLITS = 32  # with 4 key heads one request alone makes 128 programs, about one a multiprocessor
_BLOCK_BYTES = 128  # of one channel of a tile of keys: 64 keys in half precision, 32 in float32
NUM_STAGES = 3  # with two, every tile waits for the look-up of its blocks before its keys are asked for
_MIN_TILE = 16  # what tl.dot takes at least on each side


def paged_decode(
    q_BHd: Tensor,
    k_pool_PSGd: Tensor,
    v_pool_PSGd: Tensor,
    block_table_BM: Tensor,
    length_B: Tensor,
    *,
    scale: float,
    bias_pool_PS: Tensor | None = None,
    num_biased_B: Tensor | None = None,
) -> Tensor:
    """Attend with each request's query over its first ``length_B`` keys: [B, H, d]; 0 for a request without keys.

    Args: see `illava.attention.paged`. The host reads nothing; allocations depend on B alone.
    """
    (batch, num_heads, head_dim), (block_size, num_kv_heads) = q_BHd.shape, k_pool_PSGd.shape[1:3]
    share = num_heads // num_kv_heads
    q_BHd = q_BHd if q_BHd.stride(-1) == 1 else q_BHd.contiguous()
    block_dim = max(_MIN_TILE, triton.next_power_of_2(head_dim))
    partial_BHCd = torch.empty(batch, num_heads, _NUM_SPLITS, head_dim, dtype=torch.float32, device=q_BHd.device)
    lse_BHC = torch.empty(batch, num_heads, _NUM_SPLITS, dtype=torch.float32, device=q_BHd.device)
    _attend_split[(batch, num_kv_heads, _NUM_SPLITS)](
        q_BHd, k_pool_PSGd, v_pool_PSGd, block_table_BM, length_B,
        lse_BHC if bias_pool_PS is None else bias_pool_PS,  # never read where there is none
        length_B if num_biased_B is None else num_biased_B, partial_BHCd, lse_BHC, scale,
        q_BHd.stride(0), q_BHd.stride(1), block_table_BM.stride(0),
        SHARE=share, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, SPLITS=_NUM_SPLITS,
        BIASED=bias_pool_PS is not None and num_biased_B is not None,
        BLOCK_H=max(_MIN_TILE, triton.next_power_of_2(share)), BLOCK_N=_BLOCK_BYTES // k_pool_PSGd.itemsize,
        BLOCK_D=block_dim, num_stages=NUM_STAGES,
    )  # fmt: skip
    out_BHd = torch.empty(batch, num_heads, head_dim, dtype=q_BHd.dtype, device=q_BHd.device)
    _join_splits[(batch, num_heads)](
        partial_BHCd, lse_BHC, out_BHd,
        HEADS=num_heads, HEAD_DIM=head_dim, SPLITS=_NUM_SPLITS, BLOCK_D=block_dim,
    )  # fmt: skip
    return out_BHd


@triton.jit
def _attend_split(
    q, k_pool, v_pool, table, length, bias_pool, num_biased, partial, lse, scale, stride_qb, stride_qh, stride_tb,
    SHARE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    BIASED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One request, one key head, one split: softmax-weighted values and log-sum-exp of each of its query heads."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_keys = tl.load(length + row)
    if BIASED:
        biased = tl.load(num_biased + row)
    split_length = tl.cdiv(tl.cdiv(num_keys, SPLITS), BLOCK_N) * BLOCK_N
    first = split * split_length
    stop = tl.minimum(first + split_length, num_keys)
    head_H, dim_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    is_head_H, is_dim_d = head_H < SHARE, dim_d < HEAD_DIM
    out_H = ((row * KV_HEADS + kv_head) * SHARE + head_H) * SPLITS + split
    if first >= stop:
        tl.store(lse + out_H, tl.full([BLOCK_H], float("-inf"), tl.float32), mask=is_head_H)
        return
    q_Hd = tl.load(
        q + row * stride_qb + (kv_head * SHARE + head_H)[:, None] * stride_qh + dim_d[None, :],
        mask=is_head_H[:, None] & is_dim_d[None, :],
        other=0.0,
    )
    top_H = tl.full([BLOCK_H], float("-inf"), tl.float32)
    mass_H = tl.zeros([BLOCK_H], tl.float32)
    sum_Hd = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(first, stop, BLOCK_N):
        key_N = start + tl.arange(0, BLOCK_N)
        valid_N = key_N < stop
        block_id_N = tl.load(table + row * stride_tb + key_N // BLOCK_SIZE, mask=valid_N, other=0).to(tl.int64)
        slot_N = block_id_N * BLOCK_SIZE + key_N % BLOCK_SIZE
        at_N = (slot_N * KV_HEADS + kv_head) * HEAD_DIM
        at_Nd, known_Nd = at_N[:, None] + dim_d[None, :], valid_N[:, None] & is_dim_d[None, :]
        k_Nd = tl.load(k_pool + at_Nd, mask=known_Nd, other=0.0)
        v_Nd = tl.load(v_pool + at_Nd, mask=known_Nd, other=0.0)
        logit_HN = tl.dot(q_Hd, tl.trans(k_Nd), input_precision="ieee") * scale
        if BIASED:
            logit_HN += tl.load(bias_pool + slot_N, mask=valid_N & (key_N < biased), other=0.0)[None, :]
        logit_HN = tl.where(valid_N[None, :], logit_HN, float("-inf"))
        new_top_H = tl.maximum(top_H, tl.max(logit_HN, 1))
        fading_H = tl.exp(top_H - new_top_H)
        weight_HN = tl.exp(logit_HN - new_top_H[:, None])
        mass_H = mass_H * fading_H + tl.sum(weight_HN, 1)
        sum_Hd = sum_Hd * fading_H[:, None] + tl.dot(weight_HN.to(v_Nd.dtype), v_Nd, input_precision="ieee")
        top_H = new_top_H
    tl.store(lse + out_H, top_H + tl.log(mass_H), mask=is_head_H)
    at_Hd = out_H.to(tl.int64)[:, None] * HEAD_DIM + dim_d[None, :]
    tl.store(partial + at_Hd, sum_Hd / mass_H[:, None], mask=is_head_H[:, None] & is_dim_d[None, :])


@triton.jit
def _join_splits(
    partial, lse, out, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Join the splits of one query head, weighted by their log-sum-exps; a split without keys was never written."""
    out_index = tl.program_id(0) * HEADS + tl.program_id(1)
    split_C, dim_d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    is_dim_d = dim_d < HEAD_DIM
    lse_C = tl.load(lse + out_index * SPLITS + split_C)
    valid_C = lse_C > float("-inf")
    weight_C = tl.where(valid_C, tl.exp(lse_C - tl.max(tl.where(valid_C, lse_C, -1.0e30), 0)), 0.0)
    at_Cd = (out_index * SPLITS + split_C).to(tl.int64)[:, None] * HEAD_DIM + dim_d[None, :]
    mean_Cd = tl.load(partial + at_Cd, mask=valid_C[:, None] & is_dim_d[None, :], other=0.0)
    mass = tl.sum(weight_C, 0)
    merged_d = tl.sum(weight_C[:, None] * mean_Cd, 0) / tl.where(mass > 0, mass, 1.0)
    tl.store(out + out_index * HEAD_DIM + dim_d, merged_d.to(out.dtype.element_ty), mask=is_dim_d)

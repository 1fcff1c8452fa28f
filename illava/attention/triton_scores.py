"""Computes attention received per key in Triton: two passes over packed segments, never an N x N map.

The first pass writes each query's log-sum-exp, unless the attention gave it; the second sums what every block of keys
receives. Each program owns its outputs, so nothing is added atomically and a score does not depend on its batch.
Products, exponentials and sums are float32. The definitions and the torch references are in `illava.attention.scores`.

Shape suffixes: T tokens packed end to end, H query heads, J key heads, d head width, R blocks of all segments; in
kernels I queries and N keys of a block.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from illava.host_copies import device_cache, on_device

_BLOCK = {2: 64, 4: 32}  # queries or keys of a block, by bytes of a number: wider float32 blocks spill their registers
_MIN_TILE = 16  # what tl.dot takes at least on each side
_ALL_QUERIES, _SCOPE_SIZE, _CAUSAL_BIAS = 0, 1, 2  # what a sum is divided by


def received(
    q_THd: Tensor, k_TJd: Tensor, lengths: tuple[int, ...], *, scale: float, lse_HT: Tensor | None = None
) -> Tensor:
    """`illava.attention.scores.attention_received` without a bias: float32 [T]."""
    return _received(q_THd, k_TJd, lengths, None, scale=scale, divisor=_ALL_QUERIES, lse_HT=lse_HT)


def causal_received(
    q_THd: Tensor, k_TJd: Tensor, lengths: tuple[int, ...], scope_T: Tensor, *, scale: float, normalised: bool
) -> Tensor:
    """`illava.attention.scores.causal_attention_received`: float32 [T]."""
    divisor = _CAUSAL_BIAS if normalised else _SCOPE_SIZE
    return _received(q_THd, k_TJd, lengths, scope_T.contiguous(), scale=scale, divisor=divisor)


def _received(
    q_THd: Tensor,
    k_TJd: Tensor,
    lengths: tuple[int, ...],
    scope_T: Tensor | None,
    *,
    scale: float,
    divisor: int,
    lse_HT: Tensor | None = None,
) -> Tensor:
    num_tokens, num_heads, head_dim = q_THd.shape
    if not num_tokens:
        return q_THd.new_empty(0, dtype=torch.float32)
    q_THd, k_TJd = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THd, k_TJd))
    block = _BLOCK[q_THd.itemsize]
    block_R3 = _blocks(tuple(lengths), block, q_THd.device)
    score_HT = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q_THd.device)
    strides = (q_THd.stride(0), q_THd.stride(1), k_TJd.stride(0), k_TJd.stride(1))
    shape = {
        "EIGHTS": not any(stride % 8 for stride in strides),
        "SHARE": num_heads // k_TJd.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK": block,
        "BLOCK_D": max(_MIN_TILE, triton.next_power_of_2(head_dim)),
        "num_stages": 2,
    }
    grid = (len(block_R3), num_heads)
    if lse_HT is None:
        lse_HT, causal = torch.empty_like(score_HT), scope_T is not None
        _log_sum_exp[grid](q_THd, k_TJd, block_R3, lse_HT, num_tokens, scale, *strides, CAUSAL=causal, **shape)
    lse_HT = lse_HT.contiguous()
    scopes = block_R3 if scope_T is None else scope_T  # never read where attention is not scoped
    _sum_received[grid](
        q_THd, k_TJd, block_R3, lse_HT, scopes, score_HT, num_tokens, scale, *strides, DIVISOR=divisor, **shape
    )
    return score_HT.mean(0)


@device_cache(16)
def _blocks(lengths: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """First token of each block, first and end token of its segment: int32 [R, 3]; of counts the host knows."""
    bounds = zip(accumulate((0, *lengths[:-1])), accumulate(lengths), strict=True)
    rows = [(start, first, stop) for first, stop in bounds for start in range(first, stop, block)]
    return on_device(rows, device, torch.int32)


@triton.jit
def _load_rows(
    x, token, stop, head, stride_t, stride_h, EIGHTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One head's rows of a block of tokens; 0 behind the segment's end."""
    dim_d = tl.arange(0, BLOCK_D)
    of_head = head * stride_h
    if EIGHTS:  # else the compiler knows nothing of a stride of 72, and loads two bytes at a time
        of_head = tl.multiple_of(of_head, 8)
    at = token.to(tl.int64)[:, None] * stride_t + of_head + dim_d[None, :]
    return tl.load(x + at, mask=(token < stop)[:, None] & (dim_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _log_sum_exp(
    q, k, blocks, lse, num_tokens, scale, stride_qt, stride_qh, stride_kt, stride_kj,
    CAUSAL: tl.constexpr, EIGHTS: tl.constexpr, SHARE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a block of queries of one head over the keys they see."""
    block, head = tl.program_id(0), tl.program_id(1)
    begin, first, stop = tl.load(blocks + block * 3), tl.load(blocks + block * 3 + 1), tl.load(blocks + block * 3 + 2)
    query_I = begin + tl.arange(0, BLOCK)
    q_Id = _load_rows(q, query_I, stop, head, stride_qt, stride_qh, EIGHTS, HEAD_DIM, BLOCK_D)
    top_I = tl.full([BLOCK], float("-inf"), tl.float32)
    mass_I = tl.zeros([BLOCK], tl.float32)
    last = tl.minimum(begin + BLOCK, stop) if CAUSAL else stop
    for start in range(first, last, BLOCK):
        key_N = start + tl.arange(0, BLOCK)
        k_Nd = _load_rows(k, key_N, stop, head // SHARE, stride_kt, stride_kj, EIGHTS, HEAD_DIM, BLOCK_D)
        logit_IN = tl.dot(q_Id, tl.trans(k_Nd), input_precision="ieee") * scale
        seen_IN = (key_N < stop)[None, :]
        if CAUSAL:
            seen_IN = seen_IN & (key_N[None, :] <= query_I[:, None])
        logit_IN = tl.where(seen_IN, logit_IN, float("-inf"))
        new_top_I = tl.maximum(top_I, tl.max(logit_IN, 1))  # the first block holds a key that every query sees
        mass_I = mass_I * tl.exp(top_I - new_top_I) + tl.sum(tl.exp(logit_IN - new_top_I[:, None]), 1)
        top_I = new_top_I
    tl.store(lse + head.to(tl.int64) * num_tokens + query_I, top_I + tl.log(mass_I), mask=query_I < stop)


@triton.jit
def _sum_received(
    q, k, blocks, lse, scopes, score, num_tokens, scale, stride_qt, stride_qh, stride_kt, stride_kj,
    DIVISOR: tl.constexpr, EIGHTS: tl.constexpr, SHARE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a block of keys receives in one head from the queries that count, divided as ``DIVISOR`` says."""
    block, head = tl.program_id(0), tl.program_id(1)
    begin, first, stop = tl.load(blocks + block * 3), tl.load(blocks + block * 3 + 1), tl.load(blocks + block * 3 + 2)
    key_N = begin + tl.arange(0, BLOCK)
    k_Nd = _load_rows(k, key_N, stop, head // SHARE, stride_kt, stride_kj, EIGHTS, HEAD_DIM, BLOCK_D)
    sum_N = tl.zeros([BLOCK], tl.float32)
    share_N = tl.zeros([BLOCK], tl.float32)
    if DIVISOR != 0:
        scope_N = tl.load(scopes + key_N, mask=key_N < stop, other=-1)
    for start in range(begin if DIVISOR == 2 else first, stop, BLOCK):
        query_I = start + tl.arange(0, BLOCK)
        counted_IN = (query_I < stop)[:, None] & (key_N < stop)[None, :]
        if DIVISOR != 0:
            scope_I = tl.load(scopes + query_I, mask=query_I < stop, other=-2)
            counted_IN = counted_IN & (scope_I[:, None] == scope_N[None, :]) & (scope_N >= 0)[None, :]
        if DIVISOR == 1:
            share_N += tl.sum(tl.where(counted_IN, 1.0, 0.0), 0)
        if DIVISOR != 0:
            counted_IN = counted_IN & (query_I[:, None] >= key_N[None, :])
        if DIVISOR == 2:
            share_N += tl.sum(tl.where(counted_IN, 1.0 / (query_I - first + 1)[:, None].to(tl.float32), 0.0), 0)
        if DIVISOR == 0 or start >= begin:  # a causal block before the keys gives them nothing
            q_Id = _load_rows(q, query_I, stop, head, stride_qt, stride_qh, EIGHTS, HEAD_DIM, BLOCK_D)
            lse_I = tl.load(lse + head.to(tl.int64) * num_tokens + query_I, mask=query_I < stop, other=0.0)
            logit_IN = tl.dot(q_Id, tl.trans(k_Nd), input_precision="ieee") * scale
            sum_N += tl.sum(tl.where(counted_IN, tl.exp(logit_IN - lse_I[:, None]), 0.0), 0)
    if DIVISOR == 0:
        share_N += (stop - first).to(tl.float32)
    sum_N = sum_N / tl.where(share_N > 0, share_N, 1.0)
    tl.store(score + head.to(tl.int64) * num_tokens + key_N, sum_N, mask=key_N < stop)

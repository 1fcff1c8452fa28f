"""Computes attention of one new query per request over its paged keys, by the Triton kernel or its torch reference.

The reference implementation reads blocks in place where they lie end to end, and computes equally spaced rows in one
call. Otherwise a decode step on CPU would spend more time on copies of keys than on attention.

Shape suffixes: B requests, N keys of each, H query heads, G key/value heads, h query heads that share one, d head
width, P blocks of the pool, S slots of a block, M blocks of the longest request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from illava.attention.backend import kernels_on


def paged_attention(
    q_BHd: Tensor,
    k_pool_PSGd: Tensor,
    v_pool_PSGd: Tensor,
    block_table_BM: Tensor,
    length_B: Tensor,
    *,
    scale: float,
    host_lengths: Sequence[int],
    host_starts: Sequence[int] | None = None,
    bias_pool_PS: Tensor | None = None,
    num_biased_B: Tensor | None = None,
    host_num_biased: Sequence[int] | None = None,
) -> Tensor:
    """Attend with one new query per request over that request's paged keys: [B, H, d].

    `kernels_on` chooses the Triton kernel or the torch reference. The reference runs unmasked attention over exactly
    each request's tokens, so that a row never depends on its neighbours (a masked batch over the longest is 2.4 times
    slower at 3,000 tokens on CPU). It reads blocks in place where they lie end to end, and gathers others first.

    Args:
        q_BHd: queries.
        k_pool_PSGd: the whole pool of key blocks.
        v_pool_PSGd: the whole pool of value blocks.
        block_table_BM: int32 blocks of each request in order; entries behind a request's last block are not read.
        length_B: int32 keys per request, on the device, for the kernel.
        scale: factor on q.k.
        host_lengths: the same counts as host integers, for the reference.
        host_starts: slot of each request's first key where its blocks lie end to end, else -1; None: not known.
        bias_pool_PS: float32, added to every score of a slot's key, in all heads; None adds nothing.
        num_biased_B: int32 leading keys of each request that have such a bias, on the device, for the kernel.
        host_num_biased: the same counts as host integers, for the reference; None: none has.
    """
    if kernels_on(q_BHd.device) == "triton":
        from illava.attention.triton_paged import paged_decode

        return paged_decode(
            q_BHd, k_pool_PSGd, v_pool_PSGd, block_table_BM, length_B,
            scale=scale, bias_pool_PS=bias_pool_PS, num_biased_B=num_biased_B,
        )  # fmt: skip
    starts = [-1] * len(host_lengths) if host_starts is None else host_starts
    num_biased = [0] * len(host_lengths) if host_num_biased is None else host_num_biased
    return torch.cat(
        [
            _paged_sdpa(
                q_BHd[row:stop], (k_pool_PSGd, v_pool_PSGd), block_table_BM[row:stop], host_lengths[row],
                start=starts[row], gap=gap, scale=scale,
                bias=None if bias_pool_PS is None or not num_biased[row] else (bias_pool_PS, num_biased[row]),
            )
            for row, stop, gap in _uniform_rows(list(zip(host_lengths, num_biased, strict=True)), starts)
        ]
    )  # fmt: skip


def _uniform_rows(lengths: Sequence[tuple[int, int]], starts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Rows that one call can compute, of equal counts and evenly spaced in the pool: first row, end, slots between."""
    row = 0
    while row < len(lengths):
        stop, gap = row + 1, 0
        while stop < len(lengths) and lengths[stop] == lengths[row] and (starts[stop] < 0) == (starts[row] < 0):
            step = 0 if starts[row] < 0 else starts[stop] - starts[stop - 1]
            if step < 0 or (stop > row + 1 and step != gap):  # strides cannot be negative
                break
            stop, gap = stop + 1, step
        yield row, stop, gap
        row = stop


def _paged_sdpa(
    q_BHd: Tensor,
    pools: tuple[Tensor, Tensor],
    block_table_BM: Tensor,
    length: int,
    *,
    start: int,
    gap: int,
    scale: float,
    bias: tuple[Tensor, int] | None,
) -> Tensor:
    """Rows of one length in one call: row n's keys begin at slot ``start + n gap``; ``start`` < 0: gather blocks.

    ``bias`` is the pool of biases, and how many of each row's leading keys have one.
    """
    num_rows, num_heads, head_dim = q_BHd.shape
    block_size, num_kv_heads = pools[0].shape[1:3]
    # The query heads that share a key head are neighbours, as its queries: no head is repeated in memory.
    q_BGhd = q_BHd.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if start < 0:
        blocks = block_table_BM[:, : -(-length // block_size)].flatten()
        k_BNGd, v_BNGd = (
            pool.index_select(0, blocks).view(num_rows, -1, *pool.shape[2:])[:, :length] for pool in pools
        )
    else:
        token_numel = num_kv_heads * head_dim
        size, stride = (num_rows, length, num_kv_heads, head_dim), (gap * token_numel, token_numel, head_dim, 1)
        k_BNGd, v_BNGd = (pool.as_strided(size, stride, pool.storage_offset() + start * token_numel) for pool in pools)
    mask_B11N = None
    if bias is not None:
        pool_PS, num_biased = bias
        bias_BN = (
            pool_PS.index_select(0, blocks).view(num_rows, -1)[:, :num_biased]
            if start < 0
            else pool_PS.as_strided((num_rows, num_biased), (gap, 1), start)
        )
        mask_B11N = torch.nn.functional.pad(bias_BN, (0, length - num_biased))[:, None, None]
    out = scaled_dot_product_attention(
        q_BGhd, k_BNGd.transpose(1, 2), v_BNGd.transpose(1, 2), attn_mask=mask_B11N, scale=scale
    )
    return out.reshape(q_BHd.shape)

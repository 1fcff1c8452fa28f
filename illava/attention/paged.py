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
    """
    if kernels_on(q_BHd.device) == "triton":
        from illava.attention.triton_paged import paged_decode

        return paged_decode(q_BHd, k_pool_PSGd, v_pool_PSGd, block_table_BM, length_B, scale=scale)
    starts = [-1] * len(host_lengths) if host_starts is None else host_starts
    return torch.cat(
        [
            _paged_sdpa(
                q_BHd[row:stop], (k_pool_PSGd, v_pool_PSGd), block_table_BM[row:stop], host_lengths[row],
                start=starts[row], gap=gap, scale=scale,
            )
            for row, stop, gap in _uniform_rows(host_lengths, starts)
        ]
    )  # fmt: skip


def _uniform_rows(lengths: Sequence[int], starts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Rows that one call can compute, equally long and evenly spaced in the pool: first row, end, slots between two."""
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
) -> Tensor:
    """Rows of one length in one call: row n's keys begin at slot ``start + n gap``; ``start`` < 0: gather blocks."""
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
    out = scaled_dot_product_attention(q_BGhd, k_BNGd.transpose(1, 2), v_BNGd.transpose(1, 2), scale=scale)
    return out.reshape(q_BHd.shape)

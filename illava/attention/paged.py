"""Attention of one new query per request over its paged keys: one function, the Triton kernel or its twin behind it.

The twin reads pages that lie end to end in place, and serves rows that lie alike in one call: on CPU a decode step
would else spend more on copies of keys than on attention. Knows nothing of models, layers, pages' owners or reduction.

Shape suffixes: B requests, N keys of each, H query heads, G key/value heads, h query heads that share one, d head
width, P pages of the pool, S places of a page, M pages of the longest request.
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
    """One new query per request over that request's paged keys: [B, H, d].

    Behind it stands the Triton kernel where `kernels_on` says so, else its twin: that runs unmasked attention over
    exactly each request's tokens, so that a row never depends on its neighbours (a masked batch over the longest is
    2.4 times slower at 3,000 tokens on CPU). Pages that lie end to end are read in place; others are gathered first.

    Args:
        q_BHd: queries.
        k_pool_PSGd: the whole pool of key pages.
        v_pool_PSGd: the whole pool of value pages.
        block_table_BM: int32 pages of each request in order; what lies behind a request's last page is not read.
        length_B: int32 keys per request, on the device: what a kernel reads.
        scale: factor on q.k.
        host_lengths: the same counts as host integers: what the twin reads.
        host_starts: flat place of each request's first key where its pages lie end to end, else -1; None: not known.
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
    """Rows that one call can serve, equally long and evenly spaced in the pool: first row, end, places between two."""
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
    """Rows of one length in one call: row n's keys lie at ``start + n gap``; ``start`` < 0: on pages to be gathered."""
    num_rows, num_heads, head_dim = q_BHd.shape
    block_size, num_kv_heads = pools[0].shape[1:3]
    # The query heads that share a key head stand side by side as its queries: no head is repeated in memory.
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

"""Gives packed attention to SDPA in dense calls: neighbouring segments of one length together, long ones by queries.

Shape suffixes: T tokens packed end to end, S segments, N tokens of each, C queries, U keys, B queries of a block, H
query heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

_MASKED_QUERIES = 512  # bounds the mask of a long chunk: 512 x keys


def of_one_length(lengths: Sequence[int], *packed: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """For each run of neighbouring segments of one length: its tokens, and each [T, H, d] as a view [S, H, N, d]."""
    start = 0
    for length, group in groupby(lengths):
        num_segments = len(list(group))
        part = slice(start, start + num_segments * length)
        yield part, [x[part].view(num_segments, length, x.shape[1], x.shape[2]).transpose(1, 2) for x in packed]
        start = part.stop


def packed_again(out_SHNd: Tensor) -> Tensor:
    """The inverse of `of_one_length` for one run: [S * N, H, d]."""
    return out_SHNd.transpose(1, 2).flatten(0, 1)


def query_blocks(q_CHd: Tensor, *keys: Tensor) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
    """The last C tokens of one segment of U keys, a block of queries at a time: SDPA aligns its mask to the wrong end.

    Yields:
        The queries [1, H, B, d]; each of the keys up to the block's last token, [1, H, U, d]; and which of them a query
        sees, bool [B, U].
    """
    num_queries, num_keys = len(q_CHd), len(keys[0])
    for start in range(0, num_queries, _MASKED_QUERIES):
        stop = min(start + _MASKED_QUERIES, num_queries)
        seen = num_keys - num_queries + stop
        sees_BU = torch.ones(stop - start, seen, dtype=torch.bool, device=q_CHd.device).tril(seen - (stop - start))
        q_1HBd, *k_1HUd = (x.transpose(0, 1)[None] for x in (q_CHd[start:stop], *(key[:seen] for key in keys)))
        yield q_1HBd, k_1HUd, sees_BU

"""Tracks which blocks of a key/value pool are free, as spans of neighbours, and hands them out end to end.

An allocator that hands blocks out one by one, in the order they came back, scatters the blocks of a request within a
few answers. Then no row's keys can be read in place any more (see `illava.attention.paged`).

Shape suffixes: P blocks.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class BlockAllocator:
    """Allocates the blocks of one pool; the caller says which blocks come back.

    Attributes:
        count: number of free blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        self.count = num_blocks
        self._spans = [(0, num_blocks)]  # first block and end of each free span, ascending; no two touch

    def take(self, counts: Sequence[int]) -> Tensor:
        """Allocate ``sum(counts)`` blocks, ``counts[n]`` of them for table row n: int32 [sum(counts)].

        At most `count` blocks may be asked for. All come from the first free span that holds them all; else each row's
        come from the first span that holds that row's; else a row is cut into several spans.
        """
        total = sum(counts)
        wanted = [total] if any(end - first >= total for first, end in self._spans) else counts
        parts = [torch.arange(*span, dtype=torch.int32) for n in wanted for span in self._take(n)]
        self.count -= total
        return torch.cat([torch.empty(0, dtype=torch.int32), *parts])

    def give_back(self, block_P: Tensor) -> None:
        """Free these blocks; none of them may be free already."""
        self.count += block_P.numel()
        for span in _spans(block_P.sort().values):
            start = stop = bisect(self._spans, span)
            start -= bool(start) and self._spans[start - 1][1] == span[0]
            stop += stop < len(self._spans) and self._spans[stop][0] == span[1]
            merged = [*self._spans[start:stop], span]
            self._spans[start:stop] = [(min(merged)[0], max(merged)[1])]

    def free_blocks(self) -> Tensor:
        """All free blocks, ascending: int32 [P]."""
        return torch.cat([torch.arange(*span, dtype=torch.int32) for span in [(0, 0), *self._spans]])

    def _take(self, num_blocks: int) -> Iterator[tuple[int, int]]:
        """First block and end of each span that serves one table row."""
        while num_blocks:
            fitting = (n for n, (first, end) in enumerate(self._spans) if end - first >= num_blocks)
            index = next(fitting, 0)
            first, end = self._spans[index]
            stop = min(end, first + num_blocks)
            self._spans[index : index + 1] = [(stop, end)] if stop < end else []
            num_blocks -= stop - first
            yield first, stop


def _spans(block_P: Tensor) -> Iterator[tuple[int, int]]:
    """First block and end of each span of neighbours among ascending blocks."""
    breaks = (block_P.diff() > 1).nonzero().flatten() + 1
    for part_P in block_P.tensor_split(breaks):
        if part_P.numel():
            yield int(part_P[0]), int(part_P[-1]) + 1

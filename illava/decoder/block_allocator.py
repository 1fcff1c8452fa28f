"""Which pages of a pool are free, kept as runs of neighbours, so that what is taken together lies end to end.

A pool that hands pages out one by one in the order they came back scatters them within a few answers, and then no row's
keys can be read in place any more (see `illava.attention.paged`). Knows nothing of requests, layers or tensors of keys.

Shape suffixes: P pages.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class BlockAllocator:
    """The free pages of one pool; its owner says which come back.

    Attributes:
        count: how many are free.
    """

    def __init__(self, num_blocks: int) -> None:
        self.count = num_blocks
        self._runs = [(0, num_blocks)]  # first page and end of each, ascending; no two touch

    def take(self, counts: Sequence[int]) -> Tensor:
        """So many pages for each of several stretches: int32 [sum(counts)]. At most `count` may be asked for.

        All in the first run that holds them; else each stretch in the first run that holds it; else in pieces.
        """
        total = sum(counts)
        wanted = [total] if any(end - first >= total for first, end in self._runs) else counts
        parts = [torch.arange(*part, dtype=torch.int32) for n in wanted for part in self._take(n)]
        self.count -= total
        return torch.cat([torch.empty(0, dtype=torch.int32), *parts])

    def give_back(self, pages_P: Tensor) -> None:
        """These are free again; none of them may be already."""
        self.count += pages_P.numel()
        for run in _runs(pages_P.sort().values):
            start = stop = bisect(self._runs, run)
            start -= bool(start) and self._runs[start - 1][1] == run[0]
            stop += stop < len(self._runs) and self._runs[stop][0] == run[1]
            joined = [*self._runs[start:stop], run]
            self._runs[start:stop] = [(min(joined)[0], max(joined)[1])]

    def blocks(self) -> Tensor:
        """All that are free, ascending: int32 [P]."""
        return torch.cat([torch.arange(*run, dtype=torch.int32) for run in [(0, 0), *self._runs]])

    def _take(self, num_blocks: int) -> Iterator[tuple[int, int]]:
        """First page and end of the parts that serve one stretch."""
        while num_blocks:
            fitting = (n for n, (first, end) in enumerate(self._runs) if end - first >= num_blocks)
            place = next(fitting, 0)
            first, end = self._runs[place]
            stop = min(end, first + num_blocks)
            self._runs[place : place + 1] = [(stop, end)] if stop < end else []
            num_blocks -= stop - first
            yield first, stop


def _runs(pages_P: Tensor) -> Iterator[tuple[int, int]]:
    """First page and end of each run of neighbours among ascending pages."""
    breaks = (pages_P.diff() > 1).nonzero().flatten() + 1
    for part_P in pages_P.tensor_split(breaks):
        if part_P.numel():
            yield int(part_P[0]), int(part_P[-1]) + 1

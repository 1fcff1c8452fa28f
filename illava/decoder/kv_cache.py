"""The paged key/value cache: one flat pool, where a page holds `block_size` tokens of ONE layer.

A reduction inside the decoder leaves later layers fewer tokens than earlier ones, so every request has a page table of
its own for every layer, and requests of different plans share one pool and one batch. Pages for a request's whole
life (prompt and every token it may draw) are taken at admission, end to end where there is room: nothing runs out in
the middle of an answer. Knows nothing of models, prompts or plans.

Shape suffixes: L layers, B requests of a batch, M pages of the longest table, T tokens, P pages of the pool, S places
of a page, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from illava.decoder.block_allocator import BlockAllocator


@dataclass(frozen=True, slots=True)
class LayerBlockTable:
    """One layer's part of `BatchBlockTables`."""

    table_BM: Tensor
    length_B: Tensor
    host_lengths: Sequence[int]
    host_starts: Sequence[int]


@dataclass(frozen=True, slots=True)
class BatchBlockTables:
    """Where the keys of a batch of requests lie. Belongs to one composition of the batch; grows a token a step.

    Attributes:
        table_LBM: int32 pages, on the device.
        length_LB: int32 tokens held, on the device.
        host_lengths: the same counts on the host, by layer.
        host_starts: flat place of each request's first token, by layer, where its pages lie end to end; else -1.
    """

    table_LBM: Tensor
    length_LB: Tensor
    host_lengths: list[list[int]]
    host_starts: list[list[int]]

    def layer(self, n: int) -> LayerBlockTable:
        return LayerBlockTable(self.table_LBM[n], self.length_LB[n], self.host_lengths[n], self.host_starts[n])

    def grow(self) -> None:
        """Count one more token in every layer of every request."""
        self.length_LB.add_(1)
        for lengths in self.host_lengths:
            lengths[:] = [n + 1 for n in lengths]


@dataclass(frozen=True, slots=True)
class _RequestBlocks:
    """One request's pages: int32 table [L, M] on the host, and how many of each row are its own."""

    table_LM: Tensor
    counts: tuple[int, ...]

    def blocks(self) -> Tensor:
        return self.table_LM[_leading(self.counts, self.table_LM.shape[1])]

    def starts(self) -> Tensor:
        """First page of each layer whose pages lie end to end in the pool, else -1: [L]."""
        first_L1, width = self.table_LM[:, :1], self.table_LM.shape[1]
        in_order_LM = self.table_LM == first_L1 + torch.arange(width, dtype=torch.int32)
        return first_L1[:, 0].where((in_order_LM | ~_leading(self.counts, width)).all(1), -1)


class PagedCache:
    """A pool of key and value pages, and who holds which.

    Args:
        num_layers: layers of the decoder.
        num_kv_heads: key/value heads of each.
        head_dim: width of a head.
        num_blocks: size of the pool.
        block_size: tokens of a page.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers, self.num_blocks, self.block_size = num_layers, num_blocks, block_size
        shape = (num_blocks + 1, block_size, num_kv_heads, head_dim)  # the spare page: see `illava.decoder.decode`
        self.k_pool_PSGd = torch.empty(shape, dtype=dtype, device=device)
        self.v_pool_PSGd = torch.empty(shape, dtype=dtype, device=device)
        self._free = BlockAllocator(num_blocks)
        self._ref_count_P = torch.zeros(num_blocks, dtype=torch.int32)
        self._blocks_of: dict[Hashable, _RequestBlocks] = {}

    @property
    def num_free_blocks(self) -> int:
        return self._free.count

    def num_blocks_for(self, lengths: Sequence[int]) -> int:
        """Pages that a request of these tokens per layer takes: the sum over layers of ceil(length / page_size)."""
        return sum(-(-n // self.block_size) for n in lengths)

    def admit(
        self,
        request_id: Hashable,
        lengths: Sequence[int],
        *,
        prefix_from: Hashable | None = None,
        prefix_lengths: Sequence[int] = (),
    ) -> None:
        """Take the pages for ``lengths[layer]`` tokens in each layer.

        Args:
            owner: who takes them.
            lengths: tokens by layer.
            like: another owner, whose first tokens serve this one too. Whole pages of them belong to both, and are
                free once nobody holds them; what lies on the page behind is copied.
            prefix_lengths: leading tokens by layer that both have in common, which nobody writes any more.

        Raises:
            MemoryError: fewer pages are free; ask `num_free_blocks` first.
        """
        if request_id in self._blocks_of:
            raise ValueError(f"request {request_id!r} already holds pages")
        prefix_lengths = prefix_lengths if prefix_from is not None else (0,) * self.num_layers
        if any(0 < length <= n for n, length in zip(prefix_lengths, lengths, strict=True)):
            raise ValueError(f"{tuple(prefix_lengths)} tokens in common leave request {request_id!r} none of its own")
        counts = tuple(-(-n // self.block_size) for n in lengths)
        shared = [n // self.block_size for n in prefix_lengths]
        own = [n - num_shared for n, num_shared in zip(counts, shared, strict=True)]
        if sum(own) > self.num_free_blocks:
            raise MemoryError(f"request {request_id!r} needs {sum(own)} pages, {self.num_free_blocks} are free")
        width = max(counts)
        table_LM = torch.zeros(self.num_layers, width, dtype=torch.int32)
        table_LM[_leading(counts, width) & ~_leading(shared, width)] = self._free.take(own)
        if prefix_from is not None:
            source_LM = self._blocks_of[prefix_from].table_LM
            shared_LM = _leading(shared, max(shared))
            table_LM[:, : max(shared)][shared_LM] = source_LM[:, : max(shared)][shared_LM]
            partial = [layer for layer, n in enumerate(prefix_lengths) if n % self.block_size]
            column = [shared[layer] for layer in partial]
            self._copy_blocks(source_LM[partial, column], table_LM[partial, column])
        self._blocks_of[request_id] = held = _RequestBlocks(table_LM, counts)
        self._ref_count_P[held.blocks().long()] += 1

    def trim(self, request_id: Hashable, lengths: Sequence[int]) -> None:
        """Give back what lies beyond ``lengths[layer]`` tokens: a reducer's data may decide for fewer than planned."""
        held = self._blocks_of[request_id]
        counts = tuple(-(-n // self.block_size) for n in lengths)
        if counts == held.counts:
            return
        width = held.table_LM.shape[1]
        surplus = held.table_LM[_leading(held.counts, width) & ~_leading(counts, width)]
        self._blocks_of[request_id] = _RequestBlocks(held.table_LM, counts)
        self._give_back(surplus)

    def free(self, request_id: Hashable) -> None:
        """Give all pages of a request back; nothing happens where it holds none."""
        held = self._blocks_of.pop(request_id, None)
        if held is not None:
            self._give_back(held.blocks())

    def batch(self, request_ids: Sequence[Hashable], lengths: Sequence[Sequence[int]]) -> BatchBlockTables:
        """The tables of a batch in one tensor on the device; ``lengths[row][layer]`` tokens are held already."""
        tables = [self._blocks_of[request_id].table_LM for request_id in request_ids]
        start_LB = torch.stack([self._blocks_of[request_id].starts() for request_id in request_ids], 1)
        table_LBM = torch.zeros(self.num_layers, len(request_ids), max(t.shape[1] for t in tables), dtype=torch.int32)
        for row, table_LM in enumerate(tables):
            table_LBM[:, row, : table_LM.shape[1]] = table_LM
        by_layer = [list(counts) for counts in zip(*lengths, strict=True)]
        device = self.k_pool_PSGd.device
        length_LB = torch.tensor(by_layer, dtype=torch.int32, device=device)
        starts = torch.where(start_LB < 0, -1, start_LB * self.block_size).tolist()
        return BatchBlockTables(table_LBM.to(device), length_LB, by_layer, starts)

    def prompt_slots(self, table_BM: Tensor, lengths: Sequence[int]) -> Tensor:
        """Flat places of the pool for packed prompts of ``lengths`` tokens in one layer: int64 [T]."""
        return self.span_slots(table_BM, tuple((row, 0, n) for row, n in enumerate(lengths)))

    def span_slots(self, table_BM: Tensor, spans: tuple[tuple[int, int, int], ...]) -> Tensor:
        """The same for stretches of requests: (row of the table, first token, end) each."""
        row_T, index_T = _rows_and_indices(spans, table_BM.device)
        return table_BM[row_T, index_T // self.block_size].long() * self.block_size + index_T % self.block_size

    def last_slots(self, blocks: BatchBlockTables) -> Tensor:
        """Flat places of each request's newest token in every layer: int64 [L, B]."""
        index_LB = blocks.length_LB.long() - 1
        block_LB = blocks.table_LBM.gather(2, (index_LB // self.block_size)[..., None]).squeeze(2).long()
        return block_LB * self.block_size + index_LB % self.block_size

    def write(self, slot_T: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> None:
        """Put keys and values at flat places of the pool."""
        self.k_pool_PSGd.view(-1, *k_TGd.shape[1:]).index_copy_(0, slot_T, k_TGd)
        self.v_pool_PSGd.view(-1, *v_TGd.shape[1:]).index_copy_(0, slot_T, v_TGd)

    def read(self, slot_T: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at flat places of the pool: [T, G, d] each."""
        k_TGd, v_TGd = (pool.flatten(0, 1).index_select(0, slot_T) for pool in (self.k_pool_PSGd, self.v_pool_PSGd))
        return k_TGd, v_TGd

    def check(self) -> None:
        """Every page is free or held, by as many as are counted.

        Raises:
            RuntimeError: which is not so.
        """
        used_P = torch.cat(
            [torch.empty(0, dtype=torch.int32), *(held.blocks() for held in self._blocks_of.values())]
        ).long()
        counted_P = torch.bincount(used_P, minlength=self.num_blocks)
        blocks = torch.cat([self._free.blocks().long(), used_P.unique()])
        if not torch.equal(blocks.sort().values, torch.arange(self.num_blocks)):
            raise RuntimeError(
                f"{blocks.unique().numel()} of {self.num_blocks} pages accounted for in {blocks.numel()}"
            )
        if not torch.equal(counted_P.int(), self._ref_count_P):
            wrong = int((counted_P != self._ref_count_P).sum())
            raise RuntimeError(f"{wrong} pages have another number of holders than is counted")

    def _copy_blocks(self, source: Tensor, target: Tensor) -> None:
        device = self.k_pool_PSGd.device
        source, target = source.to(device), target.long().to(device)
        for pool_PSGd in (self.k_pool_PSGd, self.v_pool_PSGd):
            pool_PSGd.index_copy_(0, target, pool_PSGd.index_select(0, source))

    def _give_back(self, blocks: Tensor) -> None:
        """One holder less; what nobody holds is free."""
        self._ref_count_P[blocks.long()] -= 1
        self._free.give_back(blocks[self._ref_count_P[blocks.long()] == 0])


@lru_cache(maxsize=8)
def _rows_and_indices(spans: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and index within it of every packed token; cached because all layers of one length ask for the same."""
    rows, begins, ends = torch.tensor(spans).view(-1, 3).unbind(1)
    row_T = rows.repeat_interleave(ends - begins)
    index_T = torch.cat([torch.arange(begin, end) for _, begin, end in spans])
    return row_T.to(device), index_T.to(device)


def _leading(counts: Sequence[int], width: int) -> Tensor:
    """Mask [L, width] of the first ``counts[layer]`` cells of each row."""
    return torch.arange(width) < torch.tensor(counts)[:, None]

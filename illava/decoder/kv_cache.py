"""Stores keys and values in blocks: one flat pool, where a block holds `block_size` tokens of ONE layer.

A reduction inside the decoder leaves later layers fewer tokens than earlier ones. So every request has a block table
of its own for every layer, and requests of different plans share one pool and one batch. The cache takes the blocks for
a request's whole life (its prompt and every token it may draw) when the request is admitted, end to end where there is
room: no answer runs out of memory in its middle.

Shape suffixes: L layers, B requests of a batch, M blocks of the longest table, T tokens, P blocks of the pool, S slots
of a block, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from illava.decoder.block_allocator import BlockAllocator
from illava.decoder.block_tables import DeviceBlockTables, RequestBlocks, leading
from illava.decoder.recurrent_state import RecurrentStates, StateRows
from illava.host_copies import on_device, to_device


@dataclass(frozen=True, slots=True)
class LayerBlockTable:
    """One layer of `BatchBlockTables`."""

    table_BM: Tensor
    length_B: Tensor
    host_lengths: Sequence[int]
    host_starts: Sequence[int]
    num_biased_B: Tensor | None = None
    host_num_biased: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class BatchBlockTables:
    """Says where the keys of a batch of requests lie; grows by one token a request and step.

    It belongs to one composition of the batch.

    Attributes:
        table_LBM: int32 block numbers, on the device.
        length_LB: int32 cached tokens, on the device.
        host_lengths: the same counts on the host, by layer.
        host_starts: slot of each request's first token, by layer, where its blocks lie end to end; else -1.
        num_biased_LB: int32 leading tokens whose keys have a bias in the cache, on the device: a prompt's; 0 for a
            request without. None where no request of the batch has any.
        host_num_biased: the same counts on the host, by layer.
        states: where the requests' recurrent states lie; None for a decoder without recurrent layers.
    """

    table_LBM: Tensor
    length_LB: Tensor
    host_lengths: list[list[int]]
    host_starts: list[list[int]]
    num_biased_LB: Tensor | None = None
    host_num_biased: list[list[int]] | None = None
    states: StateRows | None = None

    def layer(self, n: int) -> LayerBlockTable:
        table = LayerBlockTable(self.table_LBM[n], self.length_LB[n], self.host_lengths[n], self.host_starts[n])
        if self.num_biased_LB is None or self.host_num_biased is None:
            return table
        return replace(table, num_biased_B=self.num_biased_LB[n], host_num_biased=self.host_num_biased[n])

    def grow(self) -> None:
        """Count one more token in every layer of every request."""
        self.length_LB.add_(1)
        for lengths in self.host_lengths:
            lengths[:] = [n + 1 for n in lengths]


class PagedCache:
    """Holds a pool of key and value blocks, and the block tables of every request.

    Args:
        num_layers: layers of the decoder.
        num_kv_heads: key/value heads of each.
        head_dim: width of a head.
        num_blocks: size of the pool.
        block_size: tokens of a block.

    Attributes:
        bias_pool_PS: float32, what every score of a slot's key gets added, in all heads; None until the first
            `write_bias`. It is a number beside the keys, not a channel of them: the keys keep the width that kernels
            want, a request without biases costs nothing, and decode steps write none, since only a prompt has them.
        states: of recurrent layers; None without any. See `illava.decoder.hybrid_cache`.
    """

    states: RecurrentStates | None = None

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
        shape = (num_blocks + 1, block_size, num_kv_heads, head_dim)  # the null block: see `illava.decoder.decode`
        self.k_pool_PSGd = torch.empty(shape, dtype=dtype, device=device)
        self.v_pool_PSGd = torch.empty(shape, dtype=dtype, device=device)
        self.bias_pool_PS: Tensor | None = None
        self._free = BlockAllocator(num_blocks)
        self._ref_count_P = torch.zeros(num_blocks, dtype=torch.int32)
        self._blocks_of: dict[Hashable, RequestBlocks] = {}
        self._tables = DeviceBlockTables(num_layers, device)

    @property
    def num_free_blocks(self) -> int:
        return self._free.count

    @property
    def num_bytes(self) -> int:
        """Bytes of the pools of keys and values."""
        return self.k_pool_PSGd.nbytes + self.v_pool_PSGd.nbytes

    def num_blocks_for(self, lengths: Sequence[int]) -> int:
        """Blocks that a request of these tokens per layer takes: the sum over layers of ceil(length / block_size)."""
        return sum(-(-n // self.block_size) for n in lengths)

    def has_room(self, lengths: Sequence[int], prefix_lengths: Sequence[int] = ()) -> bool:
        """Whether a request of these tokens per layer can be admitted now, with this prefix another's."""
        shared = sum(n // self.block_size for n in prefix_lengths)
        return self.num_blocks_for(lengths) - shared <= self.num_free_blocks

    def admit(
        self,
        request_id: Hashable,
        lengths: Sequence[int],
        *,
        prefix_from: Hashable | None = None,
        prefix_lengths: Sequence[int] = (),
        num_behind: int | None = None,
    ) -> None:
        """Allocate the blocks for ``lengths[layer]`` tokens in each layer.

        Args:
            request_id: the request that takes them.
            lengths: tokens by layer.
            prefix_from: another request, whose cached prefix serves this one too. Both share the prefix's whole
                blocks, which are freed when neither uses them any more; the tokens of a partly filled block are copied.
            prefix_lengths: tokens of that prefix by layer; no request writes to them any more.
            num_behind: of recurrent layers alone; see `illava.decoder.recurrent_state`.

        Raises:
            MemoryError: fewer blocks are free; ask `num_free_blocks` first.
        """
        if request_id in self._blocks_of:
            raise ValueError(f"request {request_id!r} already holds blocks")
        prefix_lengths = prefix_lengths if prefix_from is not None else (0,) * self.num_layers
        if any(0 < length <= n for n, length in zip(prefix_lengths, lengths, strict=True)):
            raise ValueError(f"{tuple(prefix_lengths)} tokens in common leave request {request_id!r} none of its own")
        counts = tuple(-(-n // self.block_size) for n in lengths)
        shared = [n // self.block_size for n in prefix_lengths]
        own = [n - num_shared for n, num_shared in zip(counts, shared, strict=True)]
        if sum(own) > self.num_free_blocks:
            raise MemoryError(f"request {request_id!r} needs {sum(own)} blocks, {self.num_free_blocks} are free")
        width = max(counts)
        table_LM = torch.zeros(self.num_layers, width, dtype=torch.int32)
        table_LM[leading(counts, width) & ~leading(shared, width)] = self._free.take(own)
        if prefix_from is not None:
            source_LM = self._blocks_of[prefix_from].table_LW
            shared_LM = leading(shared, max(shared))
            table_LM[:, : max(shared)][shared_LM] = source_LM[:, : max(shared)][shared_LM]
            partial = [layer for layer, n in enumerate(prefix_lengths) if n % self.block_size]
            column = [shared[layer] for layer in partial]
            self._copy_blocks(source_LM[partial, column], table_LM[partial, column])
        self._blocks_of[request_id] = request_blocks = RequestBlocks.of(table_LM, counts)
        self._tables.put(request_id, table_LM)
        self._ref_count_P[request_blocks.blocks().long()] += 1

    def trim(self, request_id: Hashable, lengths: Sequence[int]) -> None:
        """Free the blocks beyond ``lengths[layer]`` tokens: a reducer may keep fewer tokens than the plan allows."""
        request_blocks = self._blocks_of[request_id]
        counts = tuple(-(-n // self.block_size) for n in lengths)
        if counts == request_blocks.counts:
            return
        table_LM, width = request_blocks.table_LW, request_blocks.table_LW.shape[1]
        surplus = table_LM[leading(request_blocks.counts, width) & ~leading(counts, width)]
        self._blocks_of[request_id] = RequestBlocks.of(table_LM, counts)
        self._give_back(surplus)

    def free(self, request_id: Hashable) -> None:
        """Free all blocks of a request; a request without blocks is no error."""
        request_blocks = self._blocks_of.pop(request_id, None)
        if request_blocks is not None:
            self._tables.drop(request_id)
            self._give_back(request_blocks.blocks())

    def batch(
        self,
        request_ids: Sequence[Hashable],
        lengths: Sequence[Sequence[int]],
        num_biased: Sequence[Sequence[int]] = (),
    ) -> BatchBlockTables:
        """The tables of a batch, gathered on the device.

        Args:
            request_ids: one a row.
            lengths: by row and layer, the tokens that are cached already.
            num_biased: by row and layer, the leading tokens of these whose keys have a bias.
        """
        held = [self._blocks_of[request_id] for request_id in request_ids]
        table_LBM = self._tables.gather(request_ids, max(own.table_LW.shape[1] for own in held))
        by_layer = [list(counts) for counts in zip(*lengths, strict=True)]
        device = self.k_pool_PSGd.device
        length_LB = on_device(by_layer, device, torch.int32)
        starts = [
            [block if block < 0 else block * self.block_size for block in blocks]
            for blocks in zip(*(own.starts for own in held), strict=True)
        ]
        tables = BatchBlockTables(table_LBM, length_LB, by_layer, starts)
        if not any(map(any, num_biased)):
            return tables
        biased = [list(counts) for counts in zip(*num_biased, strict=True)]
        num_biased_LB = on_device(biased, device, torch.int32)
        return replace(tables, num_biased_LB=num_biased_LB, host_num_biased=biased)

    def prompt_slots(self, table_BM: Tensor, lengths: Sequence[int]) -> Tensor:
        """Slots of the pool for packed prompts of ``lengths`` tokens in one layer: int64 [T].

        A slot is a token's index in the whole pool: block number x block size + index within the block.
        """
        return self.span_slots(table_BM, tuple((row, 0, n) for row, n in enumerate(lengths)))

    def span_slots(self, table_BM: Tensor, spans: tuple[tuple[int, int, int], ...]) -> Tensor:
        """The same for spans of requests: (row of the table, first token, end) each."""
        row_T, index_T = _rows_and_indices(spans, table_BM.device)
        return table_BM[row_T, index_T // self.block_size].long() * self.block_size + index_T % self.block_size

    def last_slots(self, blocks: BatchBlockTables) -> Tensor:
        """Slots of each request's newest token in every layer: int64 [L, B]."""
        index_LB = blocks.length_LB.long() - 1
        block_LB = blocks.table_LBM.gather(2, (index_LB // self.block_size)[..., None]).squeeze(2).long()
        return block_LB * self.block_size + index_LB % self.block_size

    def write(self, slot_T: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> None:
        """Put keys and values into slots of the pool."""
        self.k_pool_PSGd.view(-1, *k_TGd.shape[1:]).index_copy_(0, slot_T, k_TGd)
        self.v_pool_PSGd.view(-1, *v_TGd.shape[1:]).index_copy_(0, slot_T, v_TGd)

    def read(self, slot_T: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values from slots of the pool: [T, G, d] each."""
        k_TGd, v_TGd = (pool.flatten(0, 1).index_select(0, slot_T) for pool in (self.k_pool_PSGd, self.v_pool_PSGd))
        return k_TGd, v_TGd

    def write_bias(self, slot_T: Tensor, bias_T: Tensor) -> None:
        """Put the biases of keys, float32 [T], into slots of the pool."""
        if self.bias_pool_PS is None:
            with torch.inference_mode(False):  # like the other pools, which are written outside of it, too
                self.bias_pool_PS = torch.zeros(self.k_pool_PSGd.shape[:2], device=self.k_pool_PSGd.device)
        self.bias_pool_PS.view(-1).index_copy_(0, slot_T, bias_T)

    def read_bias(self, slot_T: Tensor) -> Tensor:
        """The biases in slots of the pool that `write_bias` was given: float32 [T]."""
        if self.bias_pool_PS is None:
            raise RuntimeError("no bias was written yet: write_bias makes the pool")
        return self.bias_pool_PS.view(-1).index_select(0, slot_T)

    def check(self) -> None:
        """Check that every block is free or used, and that its reference count is right.

        Raises:
            RuntimeError: how many blocks are wrong.
        """
        used_P = torch.cat(
            [
                torch.empty(0, dtype=torch.int32),
                *(request_blocks.blocks() for request_blocks in self._blocks_of.values()),
            ]
        ).long()
        counted_P = torch.bincount(used_P, minlength=self.num_blocks)
        blocks = torch.cat([self._free.free_blocks().long(), used_P.unique()])
        if not torch.equal(blocks.sort().values, torch.arange(self.num_blocks)):
            raise RuntimeError(
                f"{blocks.unique().numel()} of {self.num_blocks} blocks accounted for in {blocks.numel()}"
            )
        if not torch.equal(counted_P.int(), self._ref_count_P):
            wrong = int((counted_P != self._ref_count_P).sum())
            raise RuntimeError(f"{wrong} blocks have a wrong reference count")

    def _copy_blocks(self, source: Tensor, target: Tensor) -> None:
        device = self.k_pool_PSGd.device
        source, target = to_device(source, device), to_device(target.long(), device)
        biases = [] if self.bias_pool_PS is None else [self.bias_pool_PS]
        for pool in (self.k_pool_PSGd, self.v_pool_PSGd, *biases):
            pool.index_copy_(0, target, pool.index_select(0, source))

    def _give_back(self, blocks: Tensor) -> None:
        """Count one reference less; free the blocks that nobody uses any more."""
        self._ref_count_P[blocks.long()] -= 1
        self._free.give_back(blocks[self._ref_count_P[blocks.long()] == 0])


@lru_cache(maxsize=8)
def _rows_and_indices(spans: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and index within the row of every packed token; cached, since all layers of one length ask for the same."""
    rows, begins, ends = torch.tensor(spans).view(-1, 3).unbind(1)
    row_T = rows.repeat_interleave(ends - begins)
    index_T = torch.cat([torch.arange(begin, end) for _, begin, end in spans])
    return to_device(row_T, device), to_device(index_T, device)

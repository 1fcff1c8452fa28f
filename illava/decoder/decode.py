"""Runs one decode step over tensors on the device, and keeps the fixed tensors that let a captured step be replayed.

No operation of a step depends on a value that the host would have to read. With the Triton kernels none depends on a
value that the host holds either: block tables are as wide as any request's can be, and kernels read lengths on the
device. Rows that only fill a bucket up write to the cache's null block, and to its null state, which nobody reads.

Shape suffixes: L layers, B requests, M blocks of a table, P rotary axes, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from illava.decoder.decoder import Decoder
from illava.decoder.kv_cache import BatchBlockTables, PagedCache
from illava.decoder.recurrent_state import StateRows

Embed = Callable[[Tensor], Tensor]  # word embeddings: [B] -> [B, D]
# A decode step of one composition: logits [B, V], and their greedy draw where the step holds it (see `DecodeGraphs`).
Step = Callable[[], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a decode step reads and advances, on the device: newest tokens, their positions and their block tables."""

    blocks: BatchBlockTables
    position_PB: Tensor
    token_B: Tensor


def decode_step(decoder: Decoder, embed: Embed, cache: PagedCache, inputs: StepInputs) -> Tensor:
    """Run one step of every row: logits [B, V]. Positions and lengths grow by one; the caller puts the next tokens."""
    logits_BV = decoder.decode(embed(inputs.token_B), inputs.position_PB, cache, inputs.blocks)
    inputs.position_PB.add_(1)
    return logits_BV


class StaticInputs:
    """Holds fixed input tensors for the largest batch; a bucket uses their first rows.

    Args:
        decoder: its steps read them.
        cache: its blocks are named in the tables.
        max_batch: number of rows.
        num_axes: rotary axes of a position.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, *, max_batch: int, num_axes: int) -> None:
        num_layers, device = len(decoder.kv_layers), decoder.device
        max_blocks = min(-(-decoder.max_positions // cache.block_size), cache.num_blocks)
        self._null_block = cache.num_blocks
        self._table_LBM = torch.empty(num_layers, max_batch, max_blocks, dtype=torch.int32, device=device)
        self._length_LB, self._num_biased_LB = (
            torch.empty(num_layers, max_batch, dtype=torch.int32, device=device) for _ in range(2)
        )
        self._position_PB = torch.empty(num_axes, max_batch, dtype=torch.int64, device=device)
        self._token_B = torch.empty(max_batch, dtype=torch.int64, device=device)
        self._state_slot_B = torch.empty(max_batch if cache.states else 0, dtype=torch.int64, device=device)
        self._null_state = cache.states.null_slot if cache.states else 0

    def rows(self, num_rows: int, *, biased: bool = False) -> StepInputs:
        """The first rows, as a step reads them, with biases of keys or without. The host knows no lengths here."""
        unknown: list[list[int]] = [[]] * len(self._table_LBM)
        blocks = BatchBlockTables(self._table_LBM[:, :num_rows], self._length_LB[:, :num_rows], unknown, unknown)
        if biased:
            blocks = replace(blocks, num_biased_LB=self._num_biased_LB[:, :num_rows], host_num_biased=unknown)
        if len(self._state_slot_B):
            blocks = replace(blocks, states=StateRows(self._state_slot_B[:num_rows]))
        return StepInputs(blocks, self._position_PB[:, :num_rows], self._token_B[:num_rows])

    def load(self, inputs: StepInputs) -> None:
        """Copy a composition into the first rows; the other rows become padding."""
        self.clear()
        num_rows, num_blocks = inputs.blocks.table_LBM.shape[1:]
        self._table_LBM[:, :num_rows, :num_blocks] = inputs.blocks.table_LBM
        self._length_LB[:, :num_rows] = inputs.blocks.length_LB
        if inputs.blocks.num_biased_LB is not None:
            self._num_biased_LB[:, :num_rows] = inputs.blocks.num_biased_LB
        self._position_PB[:, :num_rows] = inputs.position_PB
        self._token_B[:num_rows] = inputs.token_B
        if inputs.blocks.states is not None:
            self._state_slot_B[:num_rows] = inputs.blocks.states.slot_B

    def clear(self) -> None:
        """Make every row a padding row, which writes to the null block and the null state."""
        self._table_LBM.fill_(self._null_block)
        self._state_slot_B.fill_(self._null_state)
        for tensor in (self._length_LB, self._num_biased_LB, self._position_PB, self._token_B):
            tensor.zero_()

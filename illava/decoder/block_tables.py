"""Keeps the block tables of requests: a host copy of each, and one tensor on the device with a row for every request.

A request's row is written when its blocks are allocated, once. The tables of a batch are then gathered on the device by
their rows, so that a request that joins or leaves brings a few numbers there instead of all tables.

Shape suffixes: L layers, R rows, B requests of a batch, M blocks of the longest table, W blocks of one table.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava.host_copies import on_device, to_device


@dataclass(frozen=True, slots=True)
class RequestBlocks:
    """The blocks of one request.

    Attributes:
        table_LW: int32 block numbers, on the host.
        counts: how many of each layer's are used.
        starts: first block of each layer whose blocks lie end to end in the pool, else -1.
    """

    table_LW: Tensor
    counts: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, table_LW: Tensor, counts: tuple[int, ...]) -> RequestBlocks:
        """Take a table, and see where its blocks lie end to end."""
        first_L1, width = table_LW[:, :1], table_LW.shape[1]
        in_order_LW = table_LW == first_L1 + torch.arange(width, dtype=torch.int32)
        start_L = first_L1[:, 0].where((in_order_LW | ~leading(counts, width)).all(1), -1)
        return cls(table_LW, counts, tuple(start_L.tolist()))

    def blocks(self) -> Tensor:
        """All blocks in use."""
        return self.table_LW[leading(self.counts, self.table_LW.shape[1])]


class DeviceBlockTables:
    """Holds the tables of all requests on the device; grows by doubling its rows.

    Args:
        num_layers: rows of a request's table.
        device: where it is.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._table_LRM = torch.zeros(num_layers, 0, 0, dtype=torch.int32, device=device)
        self._row_of: dict[Hashable, int] = {}
        self._free: list[int] = []

    def put(self, request_id: Hashable, table_LW: Tensor) -> None:
        """Write a request's row; what it had beyond its own width is read by nobody."""
        self._grow(table_LW.shape[1])
        row = self._row_of[request_id] = self._free.pop()
        self._table_LRM[:, row, : table_LW.shape[1]] = to_device(table_LW, self._table_LRM.device)

    def drop(self, request_id: Hashable) -> None:
        """Give a request's row back."""
        self._free.append(self._row_of.pop(request_id))

    def gather(self, request_ids: Sequence[Hashable], width: int) -> Tensor:
        """The first ``width`` blocks of these requests: [L, B, width]."""
        rows = [self._row_of[request_id] for request_id in request_ids]
        row_B = on_device(rows, self._table_LRM.device, torch.long)
        return self._table_LRM[:, :, :width].index_select(1, row_B)

    def _grow(self, width: int) -> None:
        """Make sure that a row is free, and that rows are this wide."""
        num_layers, num_rows, num_blocks = self._table_LRM.shape
        if self._free and width <= num_blocks:
            return
        more = 0 if self._free else max(1, num_rows)
        with torch.inference_mode(False):  # rows are written outside of it, too
            shape = num_layers, num_rows + more, max(width, num_blocks)
            grown_LRM = torch.zeros(shape, dtype=torch.int32, device=self._table_LRM.device)
            grown_LRM[:, :num_rows, :num_blocks] = self._table_LRM
        self._free += range(num_rows + more - 1, num_rows - 1, -1)
        self._table_LRM = grown_LRM


def leading(counts: Sequence[int], width: int) -> Tensor:
    """Mask [L, width] of the first ``counts[layer]`` cells of each row."""
    return torch.arange(width) < torch.tensor(counts)[:, None]

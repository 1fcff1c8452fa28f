"""Lays packed cells out as grids, frame by frame, for methods that compare neighbours at stage ``media``.

Shape suffixes: T packed cells, F frames or tiles of all segments, R rows, C columns, X values of a cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from illava.host_copies import constant_on
from illava.tokens import Tokens


@dataclass(frozen=True, slots=True)
class FrameGrid:
    """Holds every frame of every segment on one grid, as large as the largest frame.

    Attributes:
        cell_FRC: int64 index of the packed cell at each (row, col), -1 where there is none.
        segment_F: the segment of each frame; frames of a segment lie in order.
    """

    cell_FRC: Tensor
    segment_F: Tensor

    @classmethod
    def of(cls, tokens: Tokens) -> FrameGrid:
        """Make the grid of packed cells."""
        device, total = tokens.coord_T3.device, sum(tokens.lengths)
        segment_T = torch.arange(len(tokens.lengths), device=device).repeat_interleave(
            constant_on(tokens.lengths, device), output_size=total
        )
        frame_T2 = torch.stack([segment_T, tokens.coord_T3[:, 0]], 1)
        frames_F2, frame_T = frame_T2.unique(dim=0, return_inverse=True)
        rows, cols = (int(tokens.coord_T3[:, axis].max()) + 1 for axis in (1, 2))
        cell_FRC = torch.full((len(frames_F2), rows, cols), -1, device=device)
        cell_FRC[frame_T, tokens.coord_T3[:, 1], tokens.coord_T3[:, 2]] = torch.arange(total, device=device)
        return cls(cell_FRC, frames_F2[:, 0])

    def values(self, value_T: Tensor, fill: float) -> Tensor:
        """Each cell's value on the grid: [T, ...] -> [F, R, C, ...], ``fill`` where there is no cell."""
        padded = torch.cat([value_T, value_T.new_full((1, *value_T.shape[1:]), fill)])
        return padded[self.cell_FRC]

"""Finds boxes of largest relevance, for methods that crop a picture to what a text is about.

Shape suffixes: F frames, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from illava.reducers.ops.frame_grid import FrameGrid
from illava.tokens import Assignment, Tokens, prune


def budget_shapes(rows: int, cols: int, keep_ratio: float) -> list[tuple[int, int]]:
    """The largest box shapes of at most floor(rows cols keep_ratio) cells, one for each height that fits."""
    budget = max(1, int(rows * cols * keep_ratio + 1e-9))
    return [(height, min(cols, budget // height)) for height in range(1, min(rows, budget) + 1)]


def best_boxes(relevance_FRC: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """The box of largest relevance in every frame: bool [F, R, C], true inside.

    Sums come from an integral image in float64. Of equal boxes the first shape, then the topmost, then the leftmost.
    """
    frames, rows, cols = relevance_FRC.shape
    total_FRC = pad(relevance_FRC.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    best_F = torch.full((frames,), -1.0, dtype=torch.float64, device=relevance_FRC.device)
    corner_F4 = torch.zeros(frames, 4, dtype=torch.long, device=relevance_FRC.device)
    for height, width in shapes:
        mass_FRC = (
            total_FRC[:, height:, width:]
            - total_FRC[:, :-height, width:]
            - total_FRC[:, height:, :-width]
            + total_FRC[:, :-height, :-width]
        )
        mass_F, coord_F = mass_FRC.flatten(1).max(1)
        top_F, left_F = coord_F // mass_FRC.shape[2], coord_F % mass_FRC.shape[2]
        box_F4 = torch.stack([top_F, left_F, top_F + height, left_F + width], 1)
        better_F = mass_F > best_F + 1e-9
        best_F, corner_F4 = torch.where(better_F, mass_F, best_F), torch.where(better_F[:, None], box_F4, corner_F4)
    top, left, bottom, right = corner_F4.T[:, :, None, None]
    row_R1 = torch.arange(rows, device=relevance_FRC.device)[:, None]
    col_1C = torch.arange(cols, device=relevance_FRC.device)[None]
    return (row_R1 >= top) & (row_R1 < bottom) & (col_1C >= left) & (col_1C < right)


def crop(tokens: Tokens, relevance_T: Tensor, keep_ratio: float) -> Assignment:
    """Keep the best box of each frame of packed cells; a frame without a cell in its box keeps its first cell."""
    grid = FrameGrid.of(tokens)
    kept_FRC = torch.zeros_like(grid.cell_FRC, dtype=torch.bool)
    relevance_FRC = grid.values(relevance_T.float(), 0.0)
    for frame, cell_RC in enumerate(grid.cell_FRC):
        rows, cols = int((cell_RC >= 0).any(1).sum()), int((cell_RC >= 0).any(0).sum())
        shapes = budget_shapes(rows, cols, keep_ratio)
        kept_FRC[frame] = best_boxes(relevance_FRC[frame][None], shapes)[0]
    return keep_cells(grid, kept_FRC, tokens.lengths)


def keep_cells(grid: FrameGrid, kept_FRC: Tensor, lengths: tuple[int, ...]) -> Assignment:
    """Keep the cells marked on their grids, and at least the first of every frame."""
    is_cell_FP, kept_FP = (grid.cell_FRC >= 0).flatten(1), kept_FRC.flatten(1) & (grid.cell_FRC >= 0).flatten(1)
    first_FP = torch.zeros_like(kept_FP).scatter_(1, is_cell_FP.int().argmax(1, keepdim=True), True)
    kept_FP = kept_FP | (first_FP & ~kept_FP.any(1, keepdim=True))
    kept_K = grid.cell_FRC.flatten(1)[kept_FP].sort().values
    segment_F = grid.segment_F.repeat_interleave(kept_FP.sum(1))
    return prune(kept_K, tuple(torch.bincount(segment_F, minlength=len(lengths)).tolist()), sum(lengths))

"""PixelPrune: drop what a lossless image coder would predict without an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from illava.reducers.frame_grid import FrameGrid
    from illava.tokens import Assignment, Tokens


class PixelPrune(Reducer):
    """Cells (patches, or 2x2 groups) that the cell to the left or above predicts do not enter the tower.

    In raster order, with A the cell to the left, B above, C above left, all as reconstructed: the prediction of X is B
    where C ~ A and not C ~ B (a vertical edge), else A; in the first row A, in the first column B. X is dropped where
    X ~ prediction, and reconstructed as it; else X is kept. U ~ V means max |U - V| <= ``threshold`` over all pixels
    and colours, so that no pixel is ever further than the threshold from what stands for it. Every frame and tile is
    coded by itself. Where a cell is missing from its grid, its neighbours are predicted as at an edge.

    Padding of an anyres canvas, which the model itself drops behind the tower, never enters it (``skip_padding``).

    Attributes:
        threshold: 0 drops exact copies only; 0 to 255.
        skip_padding: drop the canvas beside the picture, too.

    Source: arXiv 2604.00886; OPPO-Mente-Lab/PixelPrune@0bf89f3:pixelprune/methods/pred_2d.py (anchored). Written from
    the rule, by anti-diagonals. The padding is ours. Deviation: the first cell of every frame or tile is kept.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"media"})
    may_keep_all: ClassVar[bool] = True

    kind: Literal["pixel_prune"] = "pixel_prune"
    threshold: float = Field(default=0.0, ge=0.0, le=255.0)
    skip_padding: bool = True

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"padding"}) if self.skip_padding else frozenset()

    def num_kept(self, num_tokens: int) -> None:
        """None: the pixels decide."""

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.reducers.frame_grid import FrameGrid
        from illava.tokens import keep_owners

        grid = FrameGrid.of(tokens)
        value_FRCX = grid.values(tokens.hidden_TD.float(), float("nan"))  # a missing cell is like no other
        if self.skip_padding:
            stays_T = ~evidence.measured("padding")
            value_FRCX[~grid.values(stays_T, True)] = float("nan")
        owner_FRC = _owners(value_FRCX, grid, self.threshold)
        owner_T = torch.full((sum(tokens.lengths),), -1, device=owner_FRC.device)
        owner_T[grid.cell_FRC[grid.cell_FRC >= 0]] = owner_FRC[grid.cell_FRC >= 0]
        if self.skip_padding:
            owner_T = _without_padding(owner_T, ~stays_T, grid)
        return keep_owners(owner_T, tokens.lengths)


def _owners(value_FRCX: Tensor, grid: FrameGrid, threshold: float) -> Tensor:
    """The packed cell that each place is reconstructed as, int64 [F, R, C]; a diagonal of all frames at a time."""
    import torch

    known_FRCX, owner_FRC = value_FRCX.clone(), grid.cell_FRC.clone()
    _, rows, cols, _ = value_FRCX.shape

    def near(first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().amax(-1) <= threshold  # false for nan

    for diagonal in range(1, rows + cols - 1):
        row_N = torch.arange(max(0, diagonal - cols + 1), min(rows, diagonal + 1), device=value_FRCX.device)
        col_N = diagonal - row_N
        left, up = (row_N, (col_N - 1).clamp(min=0)), ((row_N - 1).clamp(min=0), col_N)
        corner_FNX = known_FRCX[:, up[0], left[1]]
        left_FNX, up_FNX = known_FRCX[:, *left], known_FRCX[:, *up]
        vertical_FN = near(corner_FNX, left_FNX) & ~near(corner_FNX, up_FNX) & (row_N > 0) & (col_N > 0)
        from_up_FN = vertical_FN | (col_N == 0)
        predicted_FNX = torch.where(from_up_FN[..., None], up_FNX, left_FNX)
        same_FN = near(value_FRCX[:, row_N, col_N], predicted_FNX)
        source_FN = torch.where(from_up_FN, owner_FRC[:, *up], owner_FRC[:, *left])
        known_FRCX[:, row_N, col_N] = torch.where(same_FN[..., None], predicted_FNX, known_FRCX[:, row_N, col_N])
        owner_FRC[:, row_N, col_N] = torch.where(same_FN, source_FN, owner_FRC[:, row_N, col_N])
    return owner_FRC


def _without_padding(owner_T: Tensor, padding_T: Tensor, grid: FrameGrid) -> Tensor:
    """Padding has no owner, but for the first cell of a tile that is nothing else."""
    import torch

    owner_T = torch.where(padding_T, -1, owner_T)
    for cell_RC in grid.cell_FRC:
        cell_N = cell_RC[cell_RC >= 0]
        if bool((owner_T[cell_N] < 0).all()):
            owner_T[cell_N[0]] = cell_N[0]
    return owner_T

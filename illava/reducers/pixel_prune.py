"""PixelPrune: drop the cells that a lossless image coder would predict without an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from illava.reducers.ops.frame_grid import FrameGrid
    from illava.tokens import Assignment, Tokens


class PixelPrune(Reducer):
    """Leave out cells (patches, or 2x2 groups) that the cell to the left or above predicts.

    In raster order, with A the cell to the left, B above, C above left, all as reconstructed: the prediction of X is B
    where C ~ A and not C ~ B (a vertical edge), else A; in the first row A, in the first column B. X is dropped where
    X ~ prediction, and reconstructed as it; else X is kept. U ~ V means max |U - V| <= ``threshold`` over all pixels
    and colours, so no pixel is further than the threshold from its representative. Every frame and tile is coded by
    itself. Where a cell is missing from its grid, its neighbours are predicted as at an edge.

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

        from illava.reducers.ops.frame_grid import FrameGrid
        from illava.tokens import assign_to_representatives

        grid = FrameGrid.of(tokens)
        known_T = torch.ones(sum(tokens.lengths), dtype=torch.bool, device=grid.cell_FRC.device)
        if self.skip_padding:
            known_T = ~evidence.measured("padding")
        representative_FRC = _representatives(tokens.hidden_TD, known_T, grid, self.threshold)
        representative_T = torch.full((sum(tokens.lengths),), -1, device=representative_FRC.device)
        representative_T[grid.cell_FRC[grid.cell_FRC >= 0]] = representative_FRC[grid.cell_FRC >= 0]
        if self.skip_padding:
            representative_T = _without_padding(representative_T, ~known_T, grid)
        return assign_to_representatives(representative_T, tokens.lengths)


def _representatives(value_TX: Tensor, known_T: Tensor, grid: FrameGrid, threshold: float) -> Tensor:
    """The packed cell that represents each cell of the grid, int64 [F, R, C]; a diagonal of all frames at a time.

    A cell is reconstructed as its representative's value, so the picture is in memory once, as it came.
    """
    import torch

    representative_FRC = grid.cell_FRC.clone()
    _, rows, cols = representative_FRC.shape

    def near(first_FN: Tensor, second_FN: Tensor) -> Tensor:
        gap_FN = (value_TX[first_FN].float() - value_TX[second_FN].float()).abs().amax(-1)
        there_FN = (first_FN >= 0) & (second_FN >= 0) & known_T[first_FN] & known_T[second_FN]
        return there_FN & (gap_FN <= threshold)  # a missing cell, or padding, is like no other

    for diagonal in range(1, rows + cols - 1):
        row_N = torch.arange(max(0, diagonal - cols + 1), min(rows, diagonal + 1), device=representative_FRC.device)
        col_N = diagonal - row_N
        left_N, up_N = (col_N - 1).clamp(min=0), (row_N - 1).clamp(min=0)
        corner_FN, left_FN, up_FN = (
            representative_FRC[:, up_N, left_N],
            representative_FRC[:, row_N, left_N],
            representative_FRC[:, up_N, col_N],
        )
        vertical_FN = near(corner_FN, left_FN) & ~near(corner_FN, up_FN) & (row_N > 0) & (col_N > 0)
        predicted_FN = torch.where(vertical_FN | (col_N == 0), up_FN, left_FN)
        own_FN = grid.cell_FRC[:, row_N, col_N]
        representative_FRC[:, row_N, col_N] = torch.where(near(own_FN, predicted_FN), predicted_FN, own_FN)
    return representative_FRC


def _without_padding(representative_T: Tensor, padding_T: Tensor, grid: FrameGrid) -> Tensor:
    """Padding has no representative; a tile of padding alone keeps its first cell."""
    import torch

    representative_T = torch.where(padding_T, -1, representative_T)
    for cell_RC in grid.cell_FRC:
        cell_N = cell_RC[cell_RC >= 0]
        if bool((representative_T[cell_N] < 0).all()):
            representative_T[cell_N[0]] = cell_N[0]
    return representative_T

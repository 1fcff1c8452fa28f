"""Spatial mean pooling on true coordinates: the baseline that keeps an even, coarser picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage
from illava.reducers.proportional import ProportionalAttention

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

_BITS = 20  # rows and columns stay below a million


class Pooling(ProportionalAttention, Reducer):
    """Cut each frame's grid into ``grid`` cells, and replace a cell's tokens by their size-weighted mean.

    With R x C the frame's extent (largest row + 1, largest column + 1), a token at (row, col) falls into cell
    (floor(row r / R), floor(col c / C)) of an r x c grid; a frame smaller than that is left as it is. The mean has
    the coordinates of the member nearest to the cell's centre of mass. Separators (row = -1) are kept.

    How many cells hold a token depends on coordinates, so counts cost one host synchronisation.

    Attributes:
        grid: (rows, columns) of every frame or tile afterwards.
        proportional_attention: see `ProportionalAttention`.

    Source: adaptive average pooling (torch's ``adaptive_avg_pool2d`` without overlapping windows), a baseline of ours.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input", "decoder_layer"})

    kind: Literal["pooling"] = "pooling"
    grid: tuple[PositiveInt, PositiveInt]

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"sizes"})

    def num_kept(self, num_tokens: int) -> None:
        """None: coordinates decide."""

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.reducers.ops.similarity import group_mean, nearest_member
        from illava.tokens import cluster

        device, total = tokens.hidden_TD.device, sum(tokens.lengths)
        segment_T = torch.arange(len(tokens.lengths), device=device).repeat_interleave(
            constant_on(tokens.lengths, device), output_size=total
        )
        label_T = self._cells(tokens.coord_T3, segment_T)
        coord_T2 = tokens.coord_T3[:, 1:].float()
        dense_T = torch.unique(label_T, return_inverse=True)[1]
        centre_T2 = group_mean(coord_T2, coord_T2.new_ones(total), dense_T, total)[dense_T]
        # Rounded, so that members at equal distance tie exactly and the earlier one represents the cell.
        closeness_T = -((coord_T2 - centre_T2) ** 2).sum(1).mul(4096).round()
        into_T = nearest_member(dense_T, closeness_T)
        own_T = into_T == torch.arange(total, device=device)
        count_S = torch.zeros(len(tokens.lengths), dtype=torch.long, device=device)
        kept = tuple(count_S.index_add_(0, segment_T, own_T.long()).tolist())
        return cluster(into_T, evidence.sizes(tokens), tokens.lengths, kept)

    def _cells(self, coord_T3: Tensor, segment_T: Tensor) -> Tensor:
        """A number for each cell of a frame of a segment; each separator gets a number of its own."""
        import torch

        frame_T, row_T, col_T = coord_T3.unbind(1)
        index_T = torch.arange(coord_T3.shape[0], device=coord_T3.device)
        _, frame_T = torch.unique(torch.stack([segment_T, frame_T], 1), dim=0, return_inverse=True)
        extent_F2 = coord_T3.new_zeros(coord_T3.shape[0], 2)
        extent_F2.scatter_reduce_(0, frame_T[:, None].expand(-1, 2), coord_T3[:, 1:] + 1, "amax")
        rows_T, cols_T = extent_F2[frame_T].clamp(min=1).unbind(1)
        cell_row_T = torch.where(rows_T > self.grid[0], row_T * self.grid[0] // rows_T, row_T)
        cell_col_T = torch.where(cols_T > self.grid[1], col_T * self.grid[1] // cols_T, col_T)
        cell_T = (((frame_T << _BITS) | cell_row_T) << _BITS) | cell_col_T
        return torch.where(row_T < 0, -1 - index_T, cell_T)

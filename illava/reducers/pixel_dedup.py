"""Pixel deduplication: let the still parts of a video enter the tower once."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.reducers.base import Evidence, EvidenceKind, MediaKind, Reducer, Stage

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class PixelDedup(Reducer):
    """Leave out every cell of a video that looks like the last cell kept at its (row, col).

    Frame by frame: X at (row, col) is dropped where max |X - Y| <= ``threshold`` over all pixels and colours, Y being
    the cell last kept at this (row, col) in an earlier frame; else X is kept. So no pixel is further than the threshold
    from its representative, however slowly a picture drifts. A frame that would vanish keeps its first cell, so that
    the model still reads its time. A video's cells are one segment; images, and the tiles of one, pass unchanged.

    Attributes:
        threshold: 0 drops exact copies only; 0 to 255.

    Source: ours; EVS (arXiv 2510.14624) asks the same of features, behind the tower.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"media"})
    media_kinds: ClassVar[frozenset[MediaKind]] = frozenset({"video"})
    may_keep_all: ClassVar[bool] = True

    kind: Literal["pixel_dedup"] = "pixel_dedup"
    threshold: float = Field(default=0.0, ge=0.0, le=255.0)

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset()

    def num_kept(self, num_tokens: int) -> None:
        """None: the pixels decide."""

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.reducers.ops.frame_grid import FrameGrid
        from illava.tokens import assign_to_representatives

        grid = FrameGrid.of(tokens)
        representative_T = torch.arange(sum(tokens.lengths), device=grid.cell_FRC.device)
        last_RC = torch.full_like(grid.cell_FRC[0], -1)  # the cell last kept at each (row, col) of this segment
        segments = grid.segment_F.tolist()
        for frame, cell_RC in enumerate(grid.cell_FRC):
            if frame and segments[frame] != segments[frame - 1]:
                last_RC = torch.full_like(last_RC, -1)
            gap_RC = (tokens.hidden_TD[cell_RC].float() - tokens.hidden_TD[last_RC].float()).abs().amax(-1)
            still_RC = (gap_RC <= self.threshold) & (cell_RC >= 0) & (last_RC >= 0)
            if torch.equal(still_RC, cell_RC >= 0):
                still_RC.view(-1)[(cell_RC.view(-1) >= 0).int().argmax()] = False
            representative_T[cell_RC[still_RC]] = last_RC[still_RC]
            last_RC = torch.where((cell_RC >= 0) & ~still_RC, cell_RC, last_RC)
        return assign_to_representatives(representative_T, tokens.lengths)

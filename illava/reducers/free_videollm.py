"""Free-VideoLLM: keep frames and regions that the question is about densely, all others thinly."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.host_copies import to_device
from illava.reducers.base import ClipScorer, Evidence, EvidenceKind, MediaKind, Reducer, Stage, TextScorer

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens


class FreeVideoLLM(Reducer):
    """Keep three paths. Slow: the frames nearest to the text; middle: evenly spread frames; fast: every frame, thinned.

    With the relevance of a cell as in `ClipCrop` and a frame's similarity its mean relevance: the ``num_slow`` frames
    of largest similarity and the ``num_middle`` frames floor((i + 1/2) F / num_middle) keep every second column of
    their box; a box is the round(R crop) x round(C crop) cells of largest relevance. Every frame keeps the
    ``fast_grid`` cells nearest to an even grid: rows floor((i + 1/2) R / r), columns floor((j + 1/2) C / c).

    Attributes:
        num_slow, num_middle: frames of either path; all frames of a shorter video.
        crop: share of a box's sides.
        fast_grid: (rows, columns) of cells of every frame.
        scorer: folder or hub id of a CLIP model, and its commit.

    Source: arXiv 2410.10441. Deviation: it pools features behind the tower (maximum over two columns, mean over the
    fast grid's cells); here, before it, one cell of each pool is read and the others never enter. It samples 50 frames;
    here ``media.num_frames`` says how many are read. Its similarity is CLIP's of image and text.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"media"})
    media_kinds: ClassVar[frozenset[MediaKind]] = frozenset({"video"})

    kind: Literal["free_videollm"] = "free_videollm"
    num_slow: int = Field(default=3, ge=0)
    num_middle: int = Field(default=5, ge=0)
    crop: float = Field(default=0.8, gt=0.0, le=1.0)
    fast_grid: tuple[int, int] = (4, 4)
    scorer: ClipScorer

    @property
    def text_scorer(self) -> TextScorer:
        """See `Reducer.text_scorer`."""
        return self.scorer

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"text_relevance"})

    def num_kept(self, num_tokens: int) -> None:
        """None: the number of frames decides."""

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.reducers.ops.boxes import best_boxes, keep_cells
        from illava.reducers.ops.frame_grid import FrameGrid

        grid = FrameGrid.of(tokens)
        relevance_FRC = grid.values(evidence.measured("text_relevance").float(), 0.0)
        kept_FRC = torch.zeros_like(grid.cell_FRC, dtype=torch.bool)
        for segment in range(len(tokens.lengths)):
            frames = (grid.segment_F == segment).nonzero().squeeze(1)
            there_FRC = grid.cell_FRC[frames] >= 0
            rows, cols = int(there_FRC.any(0).any(1).sum()), int(there_FRC.any(0).any(0).sum())
            for row in _even(rows, self.fast_grid[0]):
                kept_FRC[frames, row, _even(cols, self.fast_grid[1])[:, None]] = True
            dense = self._dense(relevance_FRC[frames], there_FRC)
            box_FRC = best_boxes(relevance_FRC[frames[dense]], [_sides(rows, cols, self.crop)])
            halved = box_FRC & ((box_FRC.int().cumsum(2) % 2) == 1)  # the first column of each pair
            kept_FRC[frames[dense]] |= halved
        return keep_cells(grid, kept_FRC, tokens.lengths)

    def _dense(self, relevance_FRC: Tensor, there_FRC: Tensor) -> Tensor:
        """Frames of the slow and the middle path, ascending; of equally near ones the earlier."""
        import torch

        similarity_F = relevance_FRC.flatten(1).sum(1) / there_FRC.flatten(1).sum(1)
        slow = torch.argsort(similarity_F, descending=True, stable=True)[: self.num_slow]
        return torch.cat([slow, to_device(_even(len(similarity_F), self.num_middle), slow.device)]).unique()


def _even(total: int, count: int) -> Tensor:
    """``count`` of ``total`` indices, evenly spread; all of them where there are no more."""
    import torch

    count = min(total, count)
    return torch.tensor([(2 * i + 1) * total // (2 * count) for i in range(count)], dtype=torch.long)


def _sides(rows: int, cols: int, crop: float) -> tuple[int, int]:
    return max(1, round(rows * crop)), max(1, round(cols * crop))

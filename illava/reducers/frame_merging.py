"""Frame merging inside the tower: merge neighbouring frames of a video into one frame, cell by cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage
from illava.reducers.proportional import ProportionalAttention

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class FrameMerging(ProportionalAttention, Reducer):
    """Merge groups of ``num_frames`` neighbouring frames into one frame; frames stay on their grid.

    Frames are counted in the order of their times, f = 0 .. F - 1, and grouped as floor(f / num_frames); the last group
    may be smaller. Every cell (row, col) of the merged frame is the size-weighted mean of that cell in its frames, and
    has the time of the group's middle frame (of two the earlier). From the block on the merged frame is a segment like
    any other: attention runs over one frame's tokens, the MLP over num_frames times fewer. Images pass
    unchanged; a request without a video of two frames is refused. At native resolution a frame is a temporal patch.

    The frames of one video must hold the same cells, so no step may drop single cells before. The number of cells
    depends on coordinates: one host synchronisation.

    Attributes:
        num_frames: frames that become one.
        proportional_attention: see `ProportionalAttention`.

    Source: ours. The temporal patch of Qwen2-VL (arXiv 2409.12191) merges two neighbouring frames in the embedding;
    here it is done after a block, by a mean, for any number of frames.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output"})
    merges_frames: ClassVar[bool] = True

    kind: Literal["frame_merging"] = "frame_merging"
    num_frames: int = Field(default=2, ge=2)

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"sizes"})

    def num_kept(self, num_tokens: int) -> None:
        """None: the number of frames decides; see `frames_kept`."""

    def frames_kept(self, num_frames: int) -> tuple[int, ...]:
        """The middle frame of each group."""
        starts = range(0, num_frames, self.num_frames)
        return tuple(start + (min(self.num_frames, num_frames - start) - 1) // 2 for start in starts)

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.reducers.ops.similarity import nearest_member
        from illava.tokens import cluster

        device, total = tokens.hidden_TD.device, sum(tokens.lengths)
        length_S = constant_on(tokens.lengths, device)
        segment_T = torch.arange(len(tokens.lengths), device=device).repeat_interleave(length_S, output_size=total)
        frame_T, row_T, col_T = tokens.coord_T3.unbind(1)
        of_frame_F2, frame_T = torch.unique(torch.stack([segment_T, frame_T], 1), dim=0, return_inverse=True)
        count_S = torch.bincount(of_frame_F2[:, 0], minlength=len(tokens.lengths))
        rank_T = frame_T - (count_S.cumsum(0) - count_S)[segment_T]
        group_T = rank_T // self.num_frames
        size_T = (count_S[segment_T] - group_T * self.num_frames).clamp(max=self.num_frames)
        middle_T = group_T * self.num_frames + (size_T - 1) // 2
        cell_T4 = torch.stack([segment_T, group_T, row_T, col_T], 1)
        label_T = torch.unique(cell_T4, dim=0, return_inverse=True)[1]
        into_T = nearest_member(label_T, -(rank_T - middle_T).abs().float())
        own_T = into_T == torch.arange(total, device=device)
        kept = tuple(torch.zeros_like(count_S).index_add_(0, segment_T, own_T.long()).tolist())
        return cluster(into_T, evidence.sizes(tokens), tokens.lengths, kept)

"""Selects the patches that enter a packed tower call, after stage ``media`` has left some of them out.

It reads `VisualInput.representative` alone, which also names the patch that represents each patch left out.

Shape suffixes: P patches of all media, K patches that enter, T tokens (patches, and CLS tokens where there are any),
C cells, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from illava.host_copies import constant_on
from illava.preprocess import VisualInput
from illava.reduction.patch_groups import spread
from illava.reduction.trace import PackedTrace, media_traces
from illava.tokens import Assignment, assign_to_representatives
from illava.visual_tokens import EncodedVisual


@dataclass(frozen=True, slots=True)
class PatchSelection:
    """Holds the patches that enter the tower in one packed call.

    Attributes:
        lengths: patches of each segment.
        coord_K3: int64 (frame or tile, row, col).
        assignment: of all patches to those that enter; None where all do. A patch that is left out is an edge of weight
            0 of its representative, if it has one.
        lengths_before: patches of each segment of the whole media.
        num_segments: tiles or frames of each visual input.
    """

    lengths: tuple[int, ...]
    coord_K3: Tensor
    assignment: Assignment | None
    lengths_before: tuple[int, ...]
    num_segments: tuple[int, ...]

    @classmethod
    def of(
        cls,
        media: Sequence[VisualInput],
        num_segments: Sequence[int],
        lengths: tuple[int, ...],
        coord_P3: Tensor,
        *,
        group_side: int = 1,
    ) -> PatchSelection:
        """Select the patches of these media.

        Args:
            media: the visual inputs of the call.
            num_segments: tiles or frames of each.
            lengths: patches of each segment, all media packed.
            coord_P3: int64 (frame or tile, row, col) of every patch, on the tower's device.
            group_side: patches per side of a cell.
        """
        segments = tuple(num_segments)
        if all(mm_item.representative is None for mm_item in media):
            return cls(lengths, coord_P3, None, lengths, segments)
        cells = tuple(n // group_side**2 for n in lengths)
        representatives, start = [], 0
        for mm_item, count in zip(media, _of_media(cells, segments), strict=True):
            own_C = torch.arange(count) if mm_item.representative is None else torch.from_numpy(mm_item.representative)
            representatives.append(torch.where(own_C >= 0, own_C + start, -1))
            start += count
        assignment = spread(assign_to_representatives(torch.cat(representatives), cells), group_side).to(
            coord_P3.device
        )
        return cls(assignment.lengths, coord_P3.index_select(0, assignment.kept_K), assignment, lengths, segments)

    @property
    def steps(self) -> tuple[Assignment, ...]:
        """The step from all patches to those that enter: one assignment, or none."""
        return () if self.assignment is None else (self.assignment,)

    def select(self, hidden_TD: Tensor, *, has_cls: bool = False) -> Tensor:
        """Select the tokens that enter, from [T, D] embedded ones; every segment keeps its CLS token."""
        if self.assignment is None:
            return hidden_TD
        kept_K = self.assignment.kept_K
        if not has_cls:
            return hidden_TD.index_select(0, kept_K)
        whole = constant_on(self.lengths_before, kept_K.device)
        segment_P = torch.arange(len(whole), device=kept_K.device).repeat_interleave(whole)
        cls_S = whole.cumsum(0) - whole + torch.arange(len(whole), device=kept_K.device)
        return hidden_TD.index_select(0, torch.cat([cls_S, kept_K + segment_P[kept_K] + 1]).sort().values)

    def traced(self, encoded: Sequence[EncodedVisual]) -> list[EncodedVisual]:
        """Put this step before all other trace steps of the media; nothing changes where all cells enter."""
        if self.assignment is None:
            return list(encoded)
        before, after = (_of_media(lengths, self.num_segments) for lengths in (self.lengths_before, self.lengths))
        step = PackedTrace("media", None, self.assignment.matrix, self.coord_K3, before, after)
        first = media_traces([step], len(self.num_segments))
        return [replace(one, trace=(*own, *one.trace)) for own, one in zip(first, encoded, strict=True)]


def _of_media(lengths: tuple[int, ...], num_segments: tuple[int, ...]) -> tuple[int, ...]:
    """Sums over the segments of each visual input."""
    return tuple(sum(lengths[slice(*own)]) for own in pairwise(accumulate(num_segments, initial=0)))

"""Keeps the tile or frame that each segment of a packed tower call is, also after frames are merged.

Host integers, but for `Segments.cls_dropped`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from illava.errors import PlanError
from illava.host_copies import constant_on
from illava.requests import derive_seed


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a packed call, in order.

    Attributes:
        mm_index: the visual input of each segment.
        tile: its tile or frame within that input.
        original_index: its index among the segments that entered the tower.
        videos: by visual input, whether its segments are frames of one video.
    """

    mm_index: tuple[int, ...]
    tile: tuple[int, ...]
    original_index: tuple[int, ...]
    videos: tuple[bool, ...]

    @classmethod
    def of(cls, counts: Sequence[int], videos: Sequence[bool]) -> Segments:
        """The segments that enter the tower: ``counts[m]`` tiles or frames of visual input m."""
        mm_index = tuple(m for m, count in enumerate(counts) for _ in range(count))
        tile = tuple(n for count in counts for n in range(count))
        return cls(mm_index, tile, tuple(range(len(tile))), tuple(videos))

    def tiles(self, mm_index: int) -> tuple[int, ...]:
        """The tiles or frames of one visual input that are kept."""
        return tuple(tile for index, tile in zip(self.mm_index, self.tile, strict=True) if index == mm_index)

    def original_indices(self, mm_index: int) -> tuple[int, ...]:
        """The indices of these tiles or frames among all segments that entered the tower."""
        return tuple(n for index, n in zip(self.mm_index, self.original_index, strict=True) if index == mm_index)

    def of_media(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each visual input."""
        totals = [0] * len(self.videos)
        for mm_index, length in zip(self.mm_index, lengths, strict=True):
            totals[mm_index] += length
        return tuple(totals)

    def counts(self, mm_index: int, lengths: Sequence[int]) -> list[int]:
        """Tokens of each segment of one visual input."""
        return [length for index, length in zip(self.mm_index, lengths, strict=True) if index == mm_index]

    def scopes(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each whole video and of every other segment: the scopes of a method that merges frames."""
        return tuple(sum(lengths[n] for n in members) for members in self._members())

    def merge_frames(
        self, lengths: Sequence[int], kept: Sequence[int], frames_kept: Callable[[int], tuple[int, ...]]
    ) -> tuple[Segments, tuple[int, ...]]:
        """The segments, and the tokens in each, after neighbouring frames of every video were merged into one.

        Args:
            lengths: tokens per segment before.
            kept: tokens of each of `scopes` afterwards.
            frames_kept: which of so many frames are kept.

        Raises:
            PlanError: the frames of a video do not hold the same cells.
        """
        kept_segments: list[int] = []
        for members, count in zip(self._members(), kept, strict=True):
            of_video = self.videos[self.mm_index[members[0]]]
            own = [members[n] for n in frames_kept(len(members))] if of_video else members
            if count != sum(lengths[n] for n in own) or len({lengths[n] for n in members}) > 1:
                raise PlanError(
                    "frames that hold different cells cannot be merged: let no step before drop single cells of one"
                )
            kept_segments += own
        mm_index, tile, original_index = (
            tuple(of[n] for n in kept_segments) for of in (self.mm_index, self.tile, self.original_index)
        )
        return Segments(mm_index, tile, original_index, self.videos), tuple(lengths[n] for n in kept_segments)

    def select(self, before: Segments, values: Sequence[int] | None) -> list[int] | None:
        """Select, from ``values`` of each segment of ``before``, those of the segments that are kept."""
        if values is None:
            return None
        by_original_index = dict(zip(before.original_index, values, strict=True))
        return [by_original_index[n] for n in self.original_index]

    def cls_dropped(self, after: Segments, num_patches: Sequence[int], device: torch.device) -> Tensor | None:
        """Index of each CLS token whose frame went into another one; a frame that is kept keeps its own as it is.

        Args:
            after: the segments after frames were merged.
            num_patches: patches of each segment before; a CLS token leads each.
            device: of the result.
        """
        if len(after.original_index) == len(self.original_index):
            return None
        kept, begins = set(after.original_index), starts([n + 1 for n in num_patches])
        gone = [begin for begin, n in zip(begins, self.original_index, strict=False) if n not in kept]
        return constant_on(gone, device)

    def _members(self) -> list[list[int]]:
        """The segments of each scope."""
        found: list[list[int]] = []
        for mm_index, group in groupby(range(len(self.mm_index)), key=self.mm_index.__getitem__):
            members = list(group)
            found += [members] if self.videos[mm_index] else [[n] for n in members]
        return found


def segment_seeds(seeds: Sequence[int] | None, num_segments: Sequence[int]) -> list[int]:
    """A root seed for every segment, from its input's seed and its number in that input, whatever else is packed.

    Args:
        seeds: one integer for each visual input; None is 0 for each.
        num_segments: tiles or frames of each visual input, in packed order.
    """
    of_mm_item = [0] * len(num_segments) if seeds is None else seeds
    return [derive_seed(seed, n) for seed, count in zip(of_mm_item, num_segments, strict=True) for n in range(count)]


def starts(counts: Sequence[int]) -> list[int]:
    """The first index of each of consecutive spans of these lengths, and the end of the last."""
    return list(accumulate(counts, initial=0))

"""Keeps the tiles or frames that each segment of a packed tower call is, also after frames are merged or joined.

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
        tiles: its tile or frame within that input; those of a window where frames were joined.
        original_indices: their indices among the segments that entered the tower.
        videos: by visual input, whether its segments are frames of one video.
    """

    mm_index: tuple[int, ...]
    tiles: tuple[tuple[int, ...], ...]
    original_indices: tuple[tuple[int, ...], ...]
    videos: tuple[bool, ...]

    @classmethod
    def of(cls, counts: Sequence[int], videos: Sequence[bool]) -> Segments:
        """The segments that enter the tower: ``counts[m]`` tiles or frames of visual input m."""
        mm_index = tuple(m for m, count in enumerate(counts) for _ in range(count))
        tiles = tuple((n,) for count in counts for n in range(count))
        return cls(mm_index, tiles, tuple((n,) for n in range(len(tiles))), tuple(videos))

    def tiles_of(self, mm_index: int) -> tuple[int, ...]:
        """The tiles or frames of one visual input that are kept."""
        return _of_input(self.mm_index, self.tiles, mm_index)

    def original_indices_of(self, mm_index: int) -> tuple[int, ...]:
        """The indices of these tiles or frames among all segments that entered the tower."""
        return _of_input(self.mm_index, self.original_indices, mm_index)

    @property
    def are_windows(self) -> bool:
        """Whether some segment holds several frames."""
        return any(len(own) > 1 for own in self.tiles)

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
        return self._joined([[n] for n in kept_segments]), tuple(lengths[n] for n in kept_segments)

    def join_frames(self, lengths: Sequence[int], num_frames: int) -> tuple[Segments, tuple[int, ...]]:
        """The segments, and the tokens in each, after windows of so many frames of every video became one segment each.

        Frames are counted in the order of their times; the last window may be shorter. What is a larger window already
        stays one, and images stay as they are.

        Args:
            lengths: tokens per segment before.
            num_frames: of a window.
        """
        groups: list[list[int]] = []
        for members in self._members():
            begins = starts([len(self.tiles[n]) for n in members])
            windows = groupby(zip(members, begins, strict=False), key=lambda pair: pair[1] // num_frames)
            groups += [[n for n, _ in own] for _, own in windows]
        return self._joined(groups), tuple(sum(lengths[n] for n in own) for own in groups)

    def select(self, before: Segments, values: Sequence[int] | None) -> list[int] | None:
        """Select, from ``values`` of each segment of ``before``, those of what is kept; a window takes its first."""
        if values is None:
            return None
        by_original_index = {own[0]: value for own, value in zip(before.original_indices, values, strict=True)}
        return [by_original_index[own[0]] for own in self.original_indices]

    def cls_dropped(self, after: Segments, num_patches: Sequence[int], device: torch.device) -> Tensor | None:
        """Index of each CLS token whose frame went into another one; a frame that is kept keeps its own as it is.

        A window keeps that of its first frame.

        Args:
            after: the segments after frames were merged or joined.
            num_patches: patches of each segment before; a CLS token leads each.
            device: of the result.
        """
        if len(after.mm_index) == len(self.mm_index):
            return None
        kept, begins = {own[0] for own in after.original_indices}, starts([n + 1 for n in num_patches])
        gone = [begin for begin, own in zip(begins, self.original_indices, strict=False) if own[0] not in kept]
        return constant_on(gone, device)

    def _joined(self, groups: Sequence[Sequence[int]]) -> Segments:
        """The segments of these groups: each holds the frames of all its members."""
        tiles, original_indices = (
            tuple(tuple(frame for n in own for frame in of[n]) for own in groups)
            for of in (self.tiles, self.original_indices)
        )
        return Segments(tuple(self.mm_index[own[0]] for own in groups), tiles, original_indices, self.videos)

    def _members(self) -> list[list[int]]:
        """The segments of each scope."""
        found: list[list[int]] = []
        for mm_index, group in groupby(range(len(self.mm_index)), key=self.mm_index.__getitem__):
            members = list(group)
            found += [members] if self.videos[mm_index] else [[n] for n in members]
        return found


def _of_input(mm_index: tuple[int, ...], values: tuple[tuple[int, ...], ...], wanted: int) -> tuple[int, ...]:
    return tuple(value for index, own in zip(mm_index, values, strict=True) if index == wanted for value in own)


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

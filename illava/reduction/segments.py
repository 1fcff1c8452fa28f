"""Which tile or frame of which medium every segment of a packed tower call is, and what joining frames makes of it.

Host integers only. Knows no tensor, no tower and no reducer by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from illava.errors import PlanError
from illava.requests import derive_seed


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a packed call, in order.

    Attributes:
        visual: the medium of each.
        tile: its tile or frame within that medium.
        original_index: its place among the segments that entered the tower.
        videos: by medium: whether its segments are frames, which follow one another in time.
    """

    mm_index: tuple[int, ...]
    tile: tuple[int, ...]
    original_index: tuple[int, ...]
    videos: tuple[bool, ...]

    @classmethod
    def of(cls, counts: Sequence[int], videos: Sequence[bool]) -> Segments:
        """As they enter the tower: ``counts[m]`` tiles or frames of medium m."""
        mm_index = tuple(m for m, count in enumerate(counts) for _ in range(count))
        tile = tuple(n for count in counts for n in range(count))
        return cls(mm_index, tile, tuple(range(len(tile))), tuple(videos))

    def tiles(self, mm_index: int) -> tuple[int, ...]:
        """The tiles or frames of one medium that still stand."""
        return tuple(tile for index, tile in zip(self.mm_index, self.tile, strict=True) if index == mm_index)

    def original_indices(self, mm_index: int) -> tuple[int, ...]:
        """The same, counted over all segments that entered the tower."""
        return tuple(n for index, n in zip(self.mm_index, self.original_index, strict=True) if index == mm_index)

    def of_media(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each medium."""
        totals = [0] * len(self.videos)
        for mm_index, length in zip(self.mm_index, lengths, strict=True):
            totals[mm_index] += length
        return tuple(totals)

    def counts(self, mm_index: int, lengths: Sequence[int]) -> list[int]:
        """Tokens of each segment of one medium."""
        return [length for index, length in zip(self.mm_index, lengths, strict=True) if index == mm_index]

    def scopes(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each video as a whole and of every other segment: what a method that joins frames looks at."""
        return tuple(sum(lengths[n] for n in members) for members in self._members())

    def merge_frames(
        self, lengths: Sequence[int], kept: Sequence[int], frames_kept: Callable[[int], tuple[int, ...]]
    ) -> tuple[Segments, tuple[int, ...]]:
        """The segments, and tokens in each, once neighbouring frames of every video are one frame.

        Args:
            lengths: tokens per segment before.
            kept: tokens of each of `scopes` afterwards.
            frames_kept: which of so many frames still stand.

        Raises:
            PlanError: the frames of a video do not hold the same cells.
        """
        kept_segments: list[int] = []
        for members, count in zip(self._members(), kept, strict=True):
            of_video = self.videos[self.mm_index[members[0]]]
            own = [members[n] for n in frames_kept(len(members))] if of_video else members
            if count != sum(lengths[n] for n in own) or len({lengths[n] for n in members}) > 1:
                raise PlanError(
                    "frames that hold different cells cannot be joined: let nothing drop single cells of a frame before"
                )
            kept_segments += own
        mm_index, tile, original_index = (
            tuple(of[n] for n in kept_segments) for of in (self.mm_index, self.tile, self.original_index)
        )
        return Segments(mm_index, tile, original_index, self.videos), tuple(lengths[n] for n in kept_segments)

    def select(self, before: Segments, values: Sequence[int] | None) -> list[int] | None:
        """Those of ``values``, one for each segment of ``before``, whose segments still stand."""
        if values is None:
            return None
        by_original_index = dict(zip(before.original_index, values, strict=True))
        return [by_original_index[n] for n in self.original_index]

    def _members(self) -> list[list[int]]:
        """The segments of each scope."""
        found: list[list[int]] = []
        for mm_index, group in groupby(range(len(self.mm_index)), key=self.mm_index.__getitem__):
            members = list(group)
            found += [members] if self.videos[mm_index] else [[n] for n in members]
        return found


def segment_seeds(seeds: Sequence[int] | None, num_segments: Sequence[int]) -> list[int]:
    """A root for every segment, from its medium's seed and its place in that medium, whatever is packed beside it.

    Args:
        seeds: one integer a medium; None is 0 for each.
        num_segments: tiles or frames of each medium, in packed order.
    """
    of_mm_item = [0] * len(num_segments) if seeds is None else seeds
    return [derive_seed(seed, n) for seed, count in zip(of_mm_item, num_segments, strict=True) for n in range(count)]


def starts(counts: Sequence[int]) -> list[int]:
    """First of each, and the end."""
    return list(accumulate(counts, initial=0))

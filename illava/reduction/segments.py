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
        medium: the medium of each.
        tile: its tile or frame within that medium.
        entered: its place among the segments that entered the tower.
        videos: by medium: whether its segments are frames, which follow one another in time.
    """

    medium: tuple[int, ...]
    tile: tuple[int, ...]
    entered: tuple[int, ...]
    videos: tuple[bool, ...]

    @classmethod
    def of(cls, counts: Sequence[int], videos: Sequence[bool]) -> Segments:
        """As they enter the tower: ``counts[m]`` tiles or frames of medium m."""
        medium = tuple(m for m, count in enumerate(counts) for _ in range(count))
        tile = tuple(n for count in counts for n in range(count))
        return cls(medium, tile, tuple(range(len(tile))), tuple(videos))

    def tiles(self, medium: int) -> tuple[int, ...]:
        """The tiles or frames of one medium that still stand."""
        return tuple(tile for owner, tile in zip(self.medium, self.tile, strict=True) if owner == medium)

    def entered_of(self, medium: int) -> tuple[int, ...]:
        """The same, counted over all segments that entered the tower."""
        return tuple(n for owner, n in zip(self.medium, self.entered, strict=True) if owner == medium)

    def of_media(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each medium."""
        totals = [0] * len(self.videos)
        for medium, length in zip(self.medium, lengths, strict=True):
            totals[medium] += length
        return tuple(totals)

    def counts(self, medium: int, lengths: Sequence[int]) -> list[int]:
        """Tokens of each segment of one medium."""
        return [length for owner, length in zip(self.medium, lengths, strict=True) if owner == medium]

    def scopes(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Tokens of each video as a whole and of every other segment: what a method that joins frames looks at."""
        return tuple(sum(lengths[n] for n in members) for members in self._members())

    def joined(
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
        standing: list[int] = []
        for members, count in zip(self._members(), kept, strict=True):
            of_video = self.videos[self.medium[members[0]]]
            own = [members[n] for n in frames_kept(len(members))] if of_video else members
            if count != sum(lengths[n] for n in own) or len({lengths[n] for n in members}) > 1:
                raise PlanError(
                    "frames that hold different cells cannot be joined: let nothing drop single cells of a frame before"
                )
            standing += own
        medium, tile, entered = (tuple(of[n] for n in standing) for of in (self.medium, self.tile, self.entered))
        return Segments(medium, tile, entered, self.videos), tuple(lengths[n] for n in standing)

    def standing(self, before: Segments, values: Sequence[int] | None) -> list[int] | None:
        """Those of ``values``, one for each segment of ``before``, whose segments still stand."""
        if values is None:
            return None
        by_entered = dict(zip(before.entered, values, strict=True))
        return [by_entered[n] for n in self.entered]

    def _members(self) -> list[list[int]]:
        """The segments of each scope."""
        found: list[list[int]] = []
        for medium, group in groupby(range(len(self.medium)), key=self.medium.__getitem__):
            members = list(group)
            found += [members] if self.videos[medium] else [[n] for n in members]
        return found


def segment_seeds(seeds: Sequence[int] | None, num_segments: Sequence[int]) -> list[int]:
    """A root for every segment, from its medium's seed and its place in that medium, whatever is packed beside it.

    Args:
        seeds: one integer a medium; None is 0 for each.
        num_segments: tiles or frames of each medium, in packed order.
    """
    of_medium = [0] * len(num_segments) if seeds is None else seeds
    return [derive_seed(seed, n) for seed, count in zip(of_medium, num_segments, strict=True) for n in range(count)]


def starts(counts: Sequence[int]) -> list[int]:
    """First of each, and the end."""
    return list(accumulate(counts, initial=0))

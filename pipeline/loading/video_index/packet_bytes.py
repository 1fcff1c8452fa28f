"""Shares the bytes of a video's packets out to the frames that were taken, as a measure of what is new in each.

An encoder spends bytes where the picture differs from what it predicts. Three things make packets large for another
reason, and are taken out:

- Of the pictures between two that others are predicted from (P), those in between (B) are small and the P picture is
  large, since it alone carries the change. They share their bytes evenly.
- A key frame is large whatever changes. What changes across one is taken from its neighbours on both sides.
- But an encoder also puts a key frame where a new scene begins. One that comes well before the longest distance between
  key frames was not due yet, so it is taken for such a cut, and its bytes count.

Pure arithmetic on packets: their sizes, order and key frame marks stand in an mp4's index, so a ranged read knows the
same as a reader of the whole file. VP9 and AV1 hide pictures in packets of others; there, sizes tell of half a second
rather than of single pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from statistics import median

from pipeline.loading.video_index.clip import Clip
from pipeline.loading.video_index.frame_times import Packet

_NOT_DUE = 0.9  # of the longest distance; encoders that count in seconds vary by some frames


@dataclass(slots=True)
class _Group:
    """A picture that is shown later than all before it in the file, and those that follow it and are shown earlier."""

    first: int
    is_key: bool
    num_bytes: int = 0
    pictures: list[int] = field(default_factory=list)


def packet_bytes(packets: Sequence[Packet], clip: Clip, chosen: Sequence[int]) -> tuple[int, ...]:
    """Return for each chosen frame the bytes of the pictures since the one before: what changed until it was shown.

    Before the first there is nothing to differ from, so it counts as much as the median of the others.

    Args:
        packets: as they lie in the file.
        clip: describes these packets.
        chosen: indices of frames, ascending.

    Returns:
        As many numbers as frames; none where sizes do not tell what changes: the container does not give the order of
        the pictures, or every picture is a key frame.
    """
    if clip.numbers is None or not chosen:
        return ()
    by_picture = _spread(_groups(packets, clip), len(clip.numbers))
    if not by_picture:
        return ()
    upto = list(accumulate(by_picture))
    since = [upto[after] - upto[before] for before, after in pairwise(chosen)]
    first = median(since) if since else by_picture[chosen[0]]
    return tuple(round(size) for size in (first, *since))


def _groups(packets: Sequence[Packet], clip: Clip) -> list[_Group]:
    """Divide the pictures into groups that are coded together; a packet that shows nothing counts to the one before."""
    index_of = {number: index for index, number in enumerate(clip.numbers or ())}
    is_indexed = clip.source.num_declared == len(packets)  # else marks come from the bytes, as all containers have them
    groups: list[_Group] = []
    for number, packet in enumerate(packets):
        index = index_of.get(number)
        if index is not None and (not groups or index > groups[-1].first):
            groups.append(_Group(index, packet.is_indexed_keyframe if is_indexed else packet.is_keyframe))
        if not groups or (index is None and not packet.is_hidden):
            continue  # an edit list or damage keeps it from being shown
        groups[-1].num_bytes += packet.num_bytes
        if index is not None:
            groups[-1].pictures.append(index)
    return groups


def _spread(groups: Sequence[_Group], num_pictures: int) -> list[float]:
    """Return each picture's bytes, in display order; none where all groups begin with a key frame that was due."""
    keys = [group.first for group in groups if group.is_key]
    distances = [after - before for before, after in pairwise([*keys, num_pictures])]
    longest = max(distances, default=0)
    cuts = {after for before, after in pairwise(keys) if after - before < _NOT_DUE * longest}
    rates = [
        None if group.is_key and group.first not in cuts else group.num_bytes / len(group.pictures) for group in groups
    ]
    before, after = _last_known(rates), _last_known(rates[::-1])[::-1]
    by_picture = [0.0] * num_pictures
    for group, sides in zip(groups, zip(before, after, strict=True), strict=True):
        known = [side for side in sides if side is not None]
        if not known:
            return []
        for picture in group.pictures:
            by_picture[picture] = sum(known) / len(known)
    return by_picture


def _last_known(rates: Sequence[float | None]) -> list[float | None]:
    """Return for each place the last rate up to it; None where there is none yet."""
    found: list[float | None] = []
    for rate in rates:
        found.append(found[-1] if rate is None and found else rate)
    return found

"""Which bytes of a video hold the wanted frames: from each one's key frame to the frame itself, in decoding order.

Pure arithmetic on packets; knows no decoder and no file. Everything whose frames might come out otherwise than from the
whole file is a doubt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.loading.decoding.clip import Clip, Packet
from pipeline.loading.decoding.mp4_index import RangeReadUnsafeError

_MOST_ENTRIES_BACK = 4  # a frame may be coded behind the key frame that is shown after it
_CODECS = frozenset({"h264", "hevc", "av1", "mpeg4"})
_MOST_IN_VAIN = 0.05  # bytes between wanted ones that are read for the sake of fewer requests, as a share of those


@dataclass(frozen=True, slots=True)
class GopSegment:
    """A key frame and what must be decoded behind it.

    Attributes:
        packets: in decoding order; the first is the key frame, the last holds a wanted frame.
        wanted: presentation time of each wanted frame -> its index in the clip.
    """

    packets: tuple[Packet, ...]
    wanted: dict[int, int]

    @property
    def seek_pts(self) -> int:
        """Where to seek for the key frame."""
        return min(time for time in (self.packets[0].pts, self.packets[0].dts) if time is not None)


def stretches(packets: Sequence[Packet], clip: Clip, wanted: Sequence[int]) -> list[GopSegment]:
    """What to decode for the wanted frames, from index alone.

    Args:
        packets: of the stream, in decoding order.
        clip: their description.
        wanted: indices of frames in the order they are shown.

    Raises:
        RangeReadUnsafeError: with the reason.
    """
    if clip.container != "mov" or clip.codec not in _CODECS:
        raise RangeReadUnsafeError(f"{clip.codec} in {clip.container} has not been tested")
    if clip.problem or clip.order is None or clip.num_videos != 1:
        raise RangeReadUnsafeError(clip.problem or "it has no frame times, or several videos")
    if any(packet.is_discard or packet.pts is None or packet.position < 0 for packet in packets):
        raise RangeReadUnsafeError("its edit list cuts frames, or its index is incomplete")
    place_of = {packet.pts: place for place, packet in enumerate(packets)}
    pts_of = {index: pts for pts, index in clip.order.items()}
    entries = [place for place, packet in enumerate(packets) if packet.is_entry]
    found: dict[int, dict[int, int]] = {}
    for index in wanted:
        pts = pts_of[index]
        key = _entry(packets, entries, place_of[pts])
        found.setdefault(key, {})[pts] = index
    return [_stretch(packets, key, found[key], place_of) for key in sorted(found)]


def _entry(packets: Sequence[Packet], entries: Sequence[int], place: int) -> int:
    """Where to begin decoding for a frame: the last key frame that is both coded and shown no later."""
    for key in reversed(entries[: bisect_right(entries, place)][-_MOST_ENTRIES_BACK:]):
        if packets[key].pts <= packets[place].pts:  # type: ignore[operator]
            return key
    raise RangeReadUnsafeError("a frame lies before the first key frame")


def _stretch(
    packets: Sequence[Packet], key: int, wanted: dict[int, int], place_of: dict[int | None, int]
) -> GopSegment:
    """Without what is shown before the key frame: nothing behind it refers to that."""
    last = max(place_of[pts] for pts in wanted)
    chosen = tuple(packet for packet in packets[key : last + 1] if packet.pts >= packets[key].pts)  # type: ignore[operator]
    return GopSegment(chosen, wanted)


def byte_ranges(found: Iterable[GopSegment]) -> list[tuple[int, int]]:
    """Half-open ranges that hold all packets; the smallest gaps between them are read too, up to a small share."""
    needed = merged((packet.position, packet.position + packet.num_bytes) for one in found for packet in one.packets)
    allowance = int(_MOST_IN_VAIN * sum(end - start for start, end in needed))
    gaps = sorted((after[0] - before[1], before[1]) for before, after in pairwise(needed))
    closed = set()
    for num_bytes, start in gaps:
        allowance -= num_bytes
        if allowance < 0:
            break
        closed.add((start, start + num_bytes))
    return merged([*needed, *closed])


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as ascending ranges that neither touch nor overlap."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        elif start < end:
            result.append((start, end))
    return result


def is_covered(wanted: Iterable[tuple[int, int]], present: Sequence[tuple[int, int]]) -> bool:
    """Whether all wanted ranges lie within those that are present."""
    have = merged(present)
    return merged([*have, *wanted]) == have

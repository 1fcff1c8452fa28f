"""Finds the bytes of a video that hold the wanted frames: from each frame's key frame to the frame, in decoding order.

Pure arithmetic on packets. Where the frames might differ from those of the whole file, the read is refused as unsafe.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.loading.video_index.clip import Clip
from pipeline.loading.video_index.frame_times import Packet
from pipeline.loading.video_index.mp4_index import RangeReadUnsafeError

_MAX_KEYFRAMES_BACK = 4  # a frame may be coded after a key frame that is shown after it
_CODECS = frozenset({"h264", "hevc", "av1", "mpeg4"})
_MAX_WASTED = 0.05  # bytes of gaps that are read to save requests, as a share of the wanted bytes


@dataclass(frozen=True, slots=True)
class GopSegment:
    """Holds a key frame and the packets that must be decoded after it.

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


def gop_segments(packets: Sequence[Packet], clip: Clip, wanted: Sequence[int]) -> list[GopSegment]:
    """Find, from the index alone, what must be decoded for the wanted frames.

    Args:
        packets: the stream's packets, in decoding order.
        clip: describes these packets.
        wanted: indices of frames, in display order.

    Raises:
        RangeReadUnsafeError: the frames might differ from those of the whole file; the message gives the reason.
    """
    source = clip.source
    if source.container != "mov" or source.codec not in _CODECS:
        raise RangeReadUnsafeError(f"{source.codec} in {source.container} has not been tested")
    if clip.problem or not clip.has_own_times or source.num_videos != 1:
        raise RangeReadUnsafeError(clip.problem or clip.repair or "it has no frame times, or several videos")
    if source.needs_bytes or source.is_turned_in_stream or clip.unsure_until or clip.first:
        raise RangeReadUnsafeError("which frames are shown, or which side of them is up, is seen in their bytes alone")
    if any(packet.is_discard or packet.pts is None or packet.position < 0 for packet in packets):
        raise RangeReadUnsafeError("its edit list cuts frames, or its index is incomplete")
    place_of = {packet.pts: place for place, packet in enumerate(packets)}
    keyframe_index = [place for place, packet in enumerate(packets) if packet.is_indexed_keyframe]
    found: dict[int, dict[int, int]] = {}
    for index in wanted:
        place = clip.numbers[index]  # type: ignore[index]
        key = _keyframe_before(packets, keyframe_index, place)
        found.setdefault(key, {})[packets[place].pts] = index  # type: ignore[index]
    return [_segment(packets, key, found[key], place_of) for key in sorted(found)]


def _keyframe_before(packets: Sequence[Packet], keyframe_index: Sequence[int], place: int) -> int:
    """Return the packet where decoding must begin for a frame: the last key frame coded and shown no later."""
    for key in reversed(keyframe_index[: bisect_right(keyframe_index, place)][-_MAX_KEYFRAMES_BACK:]):
        if packets[key].pts <= packets[place].pts:  # type: ignore[operator]
            return key
    raise RangeReadUnsafeError("a frame lies before the first key frame")


def _segment(
    packets: Sequence[Packet], key: int, wanted: dict[int, int], place_of: dict[int | None, int]
) -> GopSegment:
    """Return one segment, without packets shown before its key frame: no later packet refers to them."""
    last = max(place_of[pts] for pts in wanted)
    chosen = tuple(packet for packet in packets[key : last + 1] if packet.pts >= packets[key].pts)  # type: ignore[operator]
    return GopSegment(chosen, wanted)


def byte_ranges(found: Iterable[GopSegment]) -> list[tuple[int, int]]:
    """Return half-open ranges that hold all packets; the smallest gaps are included, up to a small share."""
    needed = merge_ranges(
        (packet.position, packet.position + packet.num_bytes) for one in found for packet in one.packets
    )
    allowance = int(_MAX_WASTED * sum(end - start for start, end in needed))
    gaps = sorted((after[0] - before[1], before[1]) for before, after in pairwise(needed))
    closed = set()
    for num_bytes, start in gaps:
        allowance -= num_bytes
        if allowance < 0:
            break
        closed.add((start, start + num_bytes))
    return merge_ranges([*needed, *closed])


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same bytes as ascending ranges that neither touch nor overlap."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        elif start < end:
            result.append((start, end))
    return result


def is_covered(wanted: Iterable[tuple[int, int]], present: Sequence[tuple[int, int]]) -> bool:
    """Whether all wanted ranges lie within those that are present."""
    have = merge_ranges(present)
    return merge_ranges([*have, *wanted]) == have

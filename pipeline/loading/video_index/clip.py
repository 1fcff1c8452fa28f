"""Describes a video file by its container's packets: when each frame appears, what is missing, where to seek.

Pure functions of a list of packets; no decoder is used and no file is opened.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipeline.errors import ItemError
from pipeline.loading.video_index.container import Container
from pipeline.loading.video_index.frame_sampling import Timeline
from pipeline.loading.video_index.frame_times import FrameTimes, Packet, find_joints, time_frames
from pipeline.loading.video_index.orientation import UPRIGHT, Orientation

_CODECS_FOR_DECORD = frozenset({"h264", "hevc", "vp8", "vp9"})
_LATE_BY_S = 0.5  # a container whose last packet ends this much before its declared end was cut short
_FLAGGED_BEFORE_JOINT = 2  # FFmpeg's parser may say of a packet what was wrong with the one after it


@dataclass(frozen=True, slots=True)
class Source:
    """Holds what a container and its stream say about themselves.

    Attributes:
        container, codec: as FFmpeg names them.
        time_base: seconds of one unit of pts.
        frame_rate: average rate; used only where the container gives no times.
        declared_s: duration that the container declares, 0 where it declares none.
        num_declared: number of packets in the container's index, 0 where it has none.
        num_videos: number of video streams in the file.
        orientation: how the first frame must be rotated and mirrored.
        is_turned_in_stream: whether the stream itself gives the orientation, not the container.
        may_change_size: whether key frames may have several sizes.
        needs_bytes: which packets show a frame is seen in their bytes alone.
    """

    container: Container
    codec: str
    time_base: Fraction
    frame_rate: Fraction | None = None
    declared_s: float = 0.0
    num_declared: int = 0
    num_videos: int = 1
    orientation: Orientation = UPRIGHT
    is_turned_in_stream: bool = False
    may_change_size: bool = False
    needs_bytes: bool = False


@dataclass(frozen=True, slots=True)
class Clip:
    """Describes one video stream.

    Attributes:
        source: what the file says about itself.
        timeline: every frame that is shown.
        numbers: number of each frame's packet, counted in the file; None where only the decoder knows the order.
        seek_pts: index of a key frame -> where to seek for it; filled only where seeking is exact.
        has_closed_gops: whether every key frame is an IDR frame.
        first: number of the first key frame's packet; no decoder shows what lies before.
        lost: numbers of packets that are damaged or not whole.
        has_hidden: whether a packet begins no frame.
        end_s: when the last packet of all streams ends.
        unsure_until: number of the packet up to which only the decoder knows which packets show a frame; 0 for none.
        problem: what is missing from the file; None where the file is complete.
        repair: which frame times are not the file's own; None where all are.
    """

    source: Source
    timeline: Timeline
    numbers: tuple[int, ...] | None
    seek_pts: dict[int, int]
    has_closed_gops: bool
    first: int
    lost: frozenset[int]
    has_hidden: bool
    end_s: float
    unsure_until: int
    problem: str | None
    repair: str | None

    @property
    def has_own_times(self) -> bool:
        """Whether every frame's time is the file's own."""
        return self.numbers is not None and self.repair is None

    @property
    def unfit_for_decord(self) -> str | None:
        """Why decord must not read this clip; None where it may."""
        source = self.source
        if source.codec == "av1":
            return "its FFmpeg has no AV1 decoder"
        if source.container == "mpegts":
            return "it silently seeks to wrong frames in mpegts"
        if source.codec in {"h264", "hevc"} and not self.has_closed_gops:
            return "it silently seeks to wrong frames where key frames are not IDR frames"
        if source.codec not in _CODECS_FOR_DECORD:
            return f"its seeking has not been tested with {source.codec}"
        if not self.has_own_times:
            return "it makes up times where the container has none, or has one twice"
        if self.has_hidden:
            return "it counts hidden frames and second fields as frames"
        if source.is_turned_in_stream:
            return "it ignores an orientation that the stream gives, not the container"
        if source.may_change_size:
            return "it scales frames that change their size midway"
        turned = source.orientation
        if turned.is_mirrored or (turned != UPRIGHT and source.container != "mov"):
            return "it mirrors nothing, and turns only what mp4 and mov files say"
        if source.num_videos > 1:
            return "it may choose another of several video streams"
        if self.problem:
            return f"it loses every frame of an incomplete file ({self.problem})"
        return None

    def gop_spans(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """Return (key frame, last wanted frame) of every group of pictures that holds a wanted frame, in order."""
        keyframes = self.timeline.keyframes
        last_of = {bisect_right(keyframes, index): index for index in wanted}
        return [(keyframes[place - 1] if place else 0, last) for place, last in last_of.items()]


def describe_clip(
    packets: Sequence[Packet], source: Source, *, end_s: float, decoded: Collection[int] | None = None
) -> Clip:
    """Put the frames into display order, with their times, and count missing ones.

    Args:
        packets: as they lie in the file.
        source: what the file says about itself.
        end_s: when the last packet of all streams ends.
        decoded: numbers of the packets whose frames the decoder gave; None where it was not asked.

    Raises:
        ItemError: ``empty_media`` or ``corrupt_media`` where no frame is left to show.
    """
    joints = find_joints(packets, container=source.container, time_base=source.time_base)
    doubtful = {joint - back for joint in joints for back in range(1, _FLAGGED_BEFORE_JOINT + 1)}
    good = [n for n, packet in enumerate(packets) if n in doubtful or not packet.is_corrupt]
    problem = None if joints else ends_early(end_s, source.declared_s)
    if len(good) < (num_expected := max(source.num_declared, len(packets))):
        problem = f"truncated or damaged: {len(good)} of {num_expected} frames are there"
    keyframes = [number for number in good if packets[number].is_keyframe]
    first = keyframes[0] if keyframes else 0
    shown = [n for n in good if n >= first and not (packets[n].is_discard or packets[n].is_hidden)]
    if decoded is not None:
        shown = sorted({*decoded} & {*shown})
    if not shown:
        raise ItemError("corrupt_media" if problem else "empty_media", f"no frame to show ({problem or 'no packets'})")
    times = time_frames(
        packets,
        shown,
        container=source.container,
        joints=joints,
        time_base=source.time_base,
        frame_rate=source.frame_rate,
    )
    order = shown if times.numbers is None else times.numbers
    timeline = Timeline(times.times_s, tuple(index for index, n in enumerate(order) if packets[n].is_keyframe))
    return Clip(
        source,
        timeline,
        times.numbers,
        _seek_pts(packets, times, timeline.keyframes) if source.container in {"mov", "matroska"} and not joints else {},
        has_closed_gops=all(packets[number].is_idr for number in keyframes),
        first=first,
        lost=frozenset(range(len(packets))) - {*good},
        has_hidden=any(packet.is_hidden for packet in packets),
        end_s=end_s,
        unsure_until=_unsure_until(packets, shown, keyframes) if decoded is None else 0,
        problem=problem,
        repair=times.repair,
    )


def _seek_pts(packets: Sequence[Packet], times: FrameTimes, keyframes: Sequence[int]) -> dict[int, int]:
    """Return where to seek for each key frame; nothing where a packet cannot be recognised after seeking."""
    identities = {identity(packet) for packet in packets}
    if times.numbers is None or len(identities) < len(packets) or any(packet.position < 0 for packet in packets):
        return {}
    of = {index: packets[times.numbers[index]].pts for index in keyframes}
    return {index: pts for index, pts in of.items() if pts is not None}  # by dts, FFmpeg goes to the key frame before


def identity(packet: Packet) -> tuple[int, int | None, int]:
    """Return what recognises a packet among those of its stream."""
    return packet.position, packet.pts, packet.num_bytes


def _unsure_until(packets: Sequence[Packet], shown: Sequence[int], keyframes: Sequence[int]) -> int:
    """Return the second key frame's number where the first is no IDR frame, and frames shown before it follow it.

    Those refer to frames that a recording which begins there does not have.
    """
    if not keyframes or packets[keyframes[0]].is_idr:
        return 0
    first, end = keyframes[0], keyframes[1] if len(keyframes) > 1 else len(packets)
    begin = packets[first].pts
    leads = (packets[n].pts for n in shown if first < n < end)
    return end if begin is not None and any(pts is not None and pts < begin for pts in leads) else 0


def ends_early(end_s: float, declared_s: float) -> str | None:
    """Say what is wrong where the last packet of all streams ends well before the declared end; else None."""
    if declared_s - end_s <= _LATE_BY_S:
        return None
    return f"truncated: ends at {end_s:.2f} s of {declared_s:.2f} s"


def check_pixels(width: int, height: int, *, most: int) -> None:
    """Raise ``too_large`` for frames above the budget."""
    if width * height > most:
        raise ItemError("too_large", f"frames of {width}x{height} px exceed max_pixels_per_frame = {most}")


def check_duration(duration_s: float, *, most_s: float) -> None:
    """Raise ``too_large`` for a clip above the budget."""
    if duration_s > most_s:
        raise ItemError("too_large", f"a clip of {duration_s:.1f} s exceeds max_duration_s = {most_s}")

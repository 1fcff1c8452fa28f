"""Describes a video file by its container's packets: when each frame appears, what is missing, where to seek.

Pure functions of a list of packets; no decoder is used and no file is opened.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from pipeline.errors import ItemError
from pipeline.loading.decoding.container import Container
from pipeline.loading.decoding.frame_sampling import Timeline
from pipeline.loading.decoding.orientation import Orientation

_CODECS_FOR_DECORD = frozenset({"h264", "hevc", "vp8", "vp9"})
_LATE_BY_S = 0.5  # a container whose last packet ends this much before its declared end was cut short


class Packet(NamedTuple):
    """Describes one coded frame, without its bytes; times are in the stream's time base.

    ``is_idr``: a key frame after which no frame refers to one before it (`pipeline.loading.decoding.nal`).
    ``is_indexed_keyframe``: the container's keyframe index lists the packet, whatever its bytes say.
    ``position``, ``num_bytes``: where the packet lies in the file; position -1 where the container does not say.
    """

    pts: int | None
    dts: int | None
    is_keyframe: bool
    is_idr: bool
    is_corrupt: bool
    is_discard: bool
    is_indexed_keyframe: bool = False
    position: int = -1
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Clip:
    """Describes one video stream.

    Attributes:
        container, codec: as FFmpeg names them.
        timeline: every frame that is shown.
        order: presentation time in the stream's time base -> frame index; None where the container has no such times.
        seek_pts: index of a key frame -> where to seek for it; filled only where seeking is exact.
        has_closed_gops: whether every key frame is an IDR frame.
        problem: what is missing from the file; None where the file is complete.
        orientation: how the first frame must be rotated and mirrored.
        num_videos: number of video streams in the file.
    """

    container: Container
    codec: str
    timeline: Timeline
    order: dict[int, int] | None
    seek_pts: dict[int, int]
    has_closed_gops: bool
    problem: str | None
    orientation: Orientation
    num_videos: int

    @property
    def unfit_for_decord(self) -> str | None:
        """Why decord must not read this clip; None where it may."""
        if self.codec == "av1":
            return "its FFmpeg has no AV1 decoder"
        if self.container == "mpegts":
            return "it silently seeks to wrong frames in mpegts"
        if self.codec in {"h264", "hevc"} and not self.has_closed_gops:
            return "it silently seeks to wrong frames where key frames are not IDR frames"
        if self.codec not in _CODECS_FOR_DECORD:
            return f"its seeking has not been tested with {self.codec}"
        if self.order is None:
            return "it makes up times where the container has none"
        if self.orientation.is_mirrored or (self.orientation != Orientation() and self.container != "mov"):
            return "it mirrors nothing, and turns only what mp4 and mov files say"
        if self.num_videos > 1:
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
    packets: Sequence[Packet],
    *,
    container: Container,
    codec: str,
    time_base: Fraction,
    frame_rate: Fraction | None,
    num_declared: int,
    problem_at_end: str | None,
    orientation: Orientation,
    num_videos: int,
) -> Clip:
    """Put packets into display order and count missing frames.

    Args:
        packets: as they lie in the file.
        container, codec: as FFmpeg names them.
        time_base: seconds of one unit of pts.
        frame_rate: average rate; used only where the container gives no presentation times.
        num_declared: number of packets in the container's index, 0 where it has none.
        problem_at_end: result of `ends_early`.
        orientation, num_videos: as in `Clip`.

    Raises:
        ItemError: ``empty_media`` or ``corrupt_media`` where no frame is left to show.
    """
    good = [packet for packet in packets if not packet.is_corrupt]
    num_expected = max(num_declared, len(packets))
    problem = problem_at_end
    if len(good) < num_expected:
        problem = f"truncated or damaged: {len(good)} of {num_expected} frames are there"
    shown = [packet for packet in good if not packet.is_discard]
    if not shown:
        raise ItemError("corrupt_media" if problem else "empty_media", f"no frame to show ({problem or 'no packets'})")

    has_closed_gops = all(packet.is_idr for packet in good if packet.is_keyframe)
    pts = [packet.pts for packet in shown if packet.pts is not None]
    if len(set(pts)) < len(shown):
        if not frame_rate:
            raise ItemError("corrupt_media", "the container gives neither frame times nor a frame rate")
        times_s = tuple(float(index / frame_rate) for index in range(len(shown)))
        timeline = Timeline(times_s, _keyframes(shown))
        return Clip(container, codec, timeline, None, {}, has_closed_gops, problem, orientation, num_videos)

    shown = [packet for _, packet in sorted(zip(pts, shown, strict=True))]
    pts = sorted(pts)
    keyframes = _keyframes(shown)
    seek_pts = {}
    if container in {"mov", "matroska"}:  # the others have no index to seek by
        seek_pts = {
            index: min(pts[index], dts if (dts := shown[index].dts) is not None else pts[index]) for index in keyframes
        }
    times_s = tuple(float((value - pts[0]) * time_base) for value in pts)
    order = {value: index for index, value in enumerate(pts)}
    timeline = Timeline(times_s, keyframes)
    return Clip(container, codec, timeline, order, seek_pts, has_closed_gops, problem, orientation, num_videos)


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


def _keyframes(shown: Sequence[Packet]) -> tuple[int, ...]:
    return tuple(index for index, packet in enumerate(shown) if packet.is_keyframe)

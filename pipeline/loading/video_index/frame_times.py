"""Puts a stream's frames into display order and says when each appears; repairs single times that cannot be right.

Times come from the file. Only one that is missing or stands twice is replaced, by its neighbours; and where the times
begin again (two recordings joined), the second recording follows the first. Pure functions of a list of packets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from pipeline.errors import ItemError
from pipeline.loading.video_index.container import Container

_JUMP_S = 10.0  # a longer gap in mpegts is a joint, as in FFmpeg's dts_delta_threshold: its clocks begin anywhere
_UNKNOWN_STEP_S = Fraction(1, 25)  # how long a single frame without a rate is shown
_BACK_S = 1.0  # matroska has no decoding times; those that FFmpeg makes up may go back by less


class Packet(NamedTuple):
    """Describes one packet of a video stream, without its bytes; times are in the stream's time base.

    ``is_idr``: a key frame after which no frame refers to one before it (`pipeline.loading.video_index.nal`).
    ``is_indexed_keyframe``: the container's keyframe index lists the packet, whatever its bytes say.
    ``position``, ``num_bytes``: where the packet lies in the file; position -1 where the container does not say.
    ``is_hidden``: the packet begins no frame that is shown (`pipeline.loading.video_index.shown_packets`).
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
    is_hidden: bool = False


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """Lists the frames of a stream.

    Attributes:
        times_s: when each frame appears, in display order, ascending, the first at 0.
        numbers: the number of each frame's packet, in the same order; None where only the decoder knows the order.
        repair: which times are not the file's own; None where all are.
    """

    times_s: tuple[float, ...]
    numbers: tuple[int, ...] | None
    repair: str | None


def find_joints(packets: Sequence[Packet], *, container: Container, time_base: Fraction) -> list[int]:
    """Return the numbers of the packets with which the times begin anew."""
    joints: list[int] = []
    back = _BACK_S / float(time_base) if container == "matroska" else 0
    jump = _JUMP_S / float(time_base) if container == "mpegts" else math.inf
    latest_dts = latest_pts = -math.inf
    for number, packet in enumerate(packets):
        if packet.dts is None or packet.is_discard:
            continue
        pts = packet.dts if packet.pts is None else packet.pts
        is_back = packet.dts < latest_dts - back and pts <= latest_pts  # an edit list repeats frames at later times
        if is_back or (packet.is_keyframe and packet.dts - latest_dts > jump and math.isfinite(latest_dts)):
            joints.append(number)
            latest_dts = latest_pts = -math.inf
        latest_dts, latest_pts = max(latest_dts, packet.dts), max(latest_pts, pts)
    return joints


def time_frames(
    packets: Sequence[Packet],
    shown: Sequence[int],
    *,
    container: Container,
    joints: Sequence[int],
    time_base: Fraction,
    frame_rate: Fraction | None,
) -> FrameTimes:
    """Order the frames that are shown, and give each its time.

    Args:
        packets: as they lie in the file.
        shown: numbers of the packets with a frame, ascending; at least one.
        container: as FFmpeg names it.
        joints: result of `find_joints`.
        time_base: seconds of one unit of pts.
        frame_rate: average rate; used only where the container has no times at all.

    Raises:
        ItemError: ``corrupt_media`` where there are neither times nor a rate.
    """
    is_guessed = container == "avi" and any(packets[number].pts != packets[number].dts for number in shown)
    if is_guessed or all(packets[number].pts is None for number in shown):  # AVI has no times of presentation
        return FrameTimes(_times_by_count(packets, shown, time_base, frame_rate), None, None)
    times: list[Fraction | int] = []
    numbers: list[int] = []
    num_repaired = 0
    rate_step = (1 / frame_rate if frame_rate else _UNKNOWN_STEP_S) / time_base
    for first, end in pairwise([0, *joints, len(packets)]):
        inside = [number for number in shown if first <= number < end]
        if not inside:
            continue
        ordered = sorted(zip(_known_pts(packets, inside), inside, strict=True))
        values = [value for value, _ in ordered]
        spread = _apart(values, rate_step)
        num_repaired += sum(a != packets[number].pts for a, (_, number) in zip(spread, ordered, strict=True))
        begin = times[-1] + _last_step(times, rate_step) if times else 0
        times += [begin + (value - spread[0]) for value in spread]
        numbers += [number for _, number in ordered]
    repair = _said(num_repaired, len(times), joints, numbers)
    return FrameTimes(tuple(float(value * time_base) for value in times), tuple(numbers), repair)


def _times_by_count(
    packets: Sequence[Packet], shown: Sequence[int], time_base: Fraction, frame_rate: Fraction | None
) -> tuple[float, ...]:
    """Return the decoding times, which lie as far apart as the frames do; without them, times at the average rate."""
    dts = [packets[number].dts for number in shown]
    known = [value for value in dts if value is not None]
    if len(known) == len(dts) and all(a < b for a, b in pairwise(known)):
        return tuple(float((value - known[0]) * time_base) for value in known)
    if not frame_rate:
        raise ItemError("corrupt_media", "the container gives neither frame times nor a frame rate")
    return tuple(float(index / frame_rate) for index in range(len(shown)))


def _known_pts(packets: Sequence[Packet], numbers: Sequence[int]) -> list[int]:
    """Return a time for each packet; one that has none has it from its decoding time, or from the packet before."""
    own = [packets[number] for number in numbers]
    delays = sorted(packet.pts - packet.dts for packet in own if None not in {packet.pts, packet.dts})  # type: ignore[operator]
    delay = delays[len(delays) // 2] if delays else 0
    pts: list[int] = []
    for packet in own:
        if packet.pts is not None:
            pts.append(packet.pts)
            continue
        pts.append(packet.dts + delay if packet.dts is not None else pts[-1] if pts else 0)
    return pts


def _apart(pts: Sequence[int], rate_step: Fraction) -> list[Fraction | int]:
    """Spread frames of one time evenly up to the next time."""
    result: list[Fraction | int] = []
    place = 0
    while place < len(pts):
        end = place
        while end < len(pts) and pts[end] == pts[place]:
            end += 1
        count = end - place
        if count > 1:
            step = pts[end] - pts[place] if end < len(pts) else count * _last_step(result, rate_step)
            result += [pts[place] + Fraction(step) * index / count for index in range(count)]
        else:
            result.append(pts[place])
        place = end
    return result


def _last_step(times: Sequence[Fraction | int], rate_step: Fraction) -> Fraction | int:
    """Return how long the last frame is shown: as long as the one before."""
    return times[-1] - times[-2] if len(times) > 1 else rate_step


def _said(num_repaired: int, num_frames: int, joints: Sequence[int], numbers: Sequence[int]) -> str | None:
    parts = []
    if num_repaired:
        parts.append(
            f"{num_repaired} of {num_frames} frame times are missing in the file or stand there twice, and were set "
            "between their neighbours"
        )
    begun = sorted({sum(number < joint for number in numbers) for joint in joints} - {0, num_frames})
    if begun:
        frames = ", ".join(map(str, begun[:5])) + (", ..." if len(begun) > 5 else "")
        parts.append(f"the file's times begin anew at frame {frames} of {num_frames}: joined recordings, shown in turn")
    return "; ".join(parts) or None

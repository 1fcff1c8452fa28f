"""Decodes chosen frames of a video with PyAV: from the start, after seeking, or out of segments alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ItemError
from pipeline.loading.decoding.pyav_file import demux_all, opened, orientation_in, upright_rgb
from pipeline.loading.video_index.clip import Clip, describe_clip, identity
from pipeline.loading.video_index.container import Container
from pipeline.loading.video_index.frame_times import Packet
from pipeline.loading.video_index.gop_ranges import GopSegment
from pipeline.loading.video_index.mp4_index import RangeReadUnsafeError
from pipeline.loading.video_index.nal import is_random_access_point

if TYPE_CHECKING:
    from pipeline.config.schema import MediaConfig


def list_frames(path: str, clip: Clip, packets: Sequence[Packet]) -> Clip:
    """Describe a clip anew by the frames that the decoder gives; it decodes all of it, or only the part that is unsure.

    The clip is returned as it is where a frame of that part is damaged.
    """
    end = clip.unsure_until or len(packets)
    given, damage = set(range(end, len(packets))), Damage()
    with opened(path, clip.source.container) as (file, stream):
        for number, _ in _decode(file, stream, clip, packets, damage):
            given.add(number)
            if number >= end:
                break
    return clip if damage.is_seen else describe_clip(packets, clip.source, end_s=clip.end_s, decoded=given)


@dataclass(slots=True)
class Damage:
    """Says of one reading whether a packet or a frame was damaged."""

    is_seen: bool = False


def read_pyav(
    path: str, clip: Clip, packets: Sequence[Packet], wanted: Sequence[int], media: MediaConfig
) -> tuple[dict[int, np.ndarray], Damage]:
    """Decode the wanted frames, by index; seek where seeking is exact, else decode from the start.

    Frames that cannot be decoded are left out.
    """
    import av

    found: dict[int, np.ndarray] = {}
    damage = Damage()
    for seek_pts in (clip.seek_pts, {}):
        with opened(path, clip.source.container) as (file, stream):
            decoded, position = _indexed(_decode(file, stream, clip, packets, damage), clip, damage), -1
            for key, last in clip.gop_spans(wanted):
                if key > position + 1 and key in seek_pts:
                    try:
                        file.seek(seek_pts[key], stream=stream)
                    except av.error.FFmpegError as error:
                        if isinstance(error, MemoryError):
                            raise
                        break  # and decode from the start
                    decoded = _indexed(_decode(file, stream, clip, packets, damage, is_start=False), clip, damage)
                for position, frame in decoded:
                    if position in wanted:
                        found[position] = upright_rgb(frame, clip.source.orientation, media)
                    if position >= last:
                        break
        if len(found) == len(wanted) or not seek_pts:  # else a frame that was skipped may have been needed
            break
    if len({frame.shape for frame in found.values()}) > 1:
        raise ItemError("unsupported_media", "the video changes its frame size midway")
    return found, damage


def _indexed(decoded: Iterator[tuple[int, Any]], clip: Clip, damage: Damage) -> Iterator[tuple[int, Any]]:
    """Yield frames with their index in the clip; count them where the container does not tell their order."""
    index_of = {number: index for index, number in enumerate(clip.numbers or ())}
    for count, (number, frame) in enumerate(decoded):
        if clip.numbers is None and damage.is_seen:
            return  # after a lost frame every index would be wrong
        index = count if clip.numbers is None else index_of.get(number)
        if index is not None:
            yield index, frame


def decode_segments(
    path: str, container: Container, found: Sequence[GopSegment], media: MediaConfig
) -> dict[int, np.ndarray]:
    """Decode the wanted frames, by index, from the bytes of these segments alone.

    Raises:
        RangeReadUnsafeError: the bytes are not what the index said, or a frame is not decoded whole without a warning.
    """
    import av

    frames: dict[int, np.ndarray] = {}
    with opened(path, container) as (file, stream):
        codec = stream.codec_context
        codec.options = {"err_detect": "explode"}
        try:
            for one in found:
                file.seek(one.seek_pts, stream=stream)
                decoded = [frame for packet in _exactly(file, stream, one.packets) for frame in packet.decode()]
                for frame in [*decoded, *codec.decode(None)]:
                    if frame.is_corrupt:
                        raise RangeReadUnsafeError("a frame is not whole")
                    if frame.pts in one.wanted:
                        frames[one.wanted[frame.pts]] = upright_rgb(frame, orientation_in(frame), media)
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            raise RangeReadUnsafeError(f"a wanted segment cannot be decoded: {error.strerror}") from error
    return frames


def _exactly(file: Any, stream: Any, expected: Sequence[Packet]) -> Iterator[Any]:
    """Yield the expected packets after the container's position; packets in between have no bytes and are skipped."""
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata
    left = deque(expected)
    for packet in file.demux(stream):
        if packet.pos != left[0].position:
            continue
        if (packet.pts, packet.size) != (left[0].pts, left[0].num_bytes):
            raise RangeReadUnsafeError("its index reads otherwise after seeking")
        if left[0] is expected[0] and not is_random_access_point(bytes(packet), codec=codec, extradata=extradata):
            raise RangeReadUnsafeError("a key frame of it refers to frames before")
        yield packet
        left.popleft()
        if not left:
            return
    raise RangeReadUnsafeError("seeking led elsewhere than the index said")


def _decode(
    file: Any, stream: Any, clip: Clip, packets: Sequence[Packet], damage: Damage, *, is_start: bool = True
) -> Iterator[tuple[int, Any]]:
    """Yield frames with the number of their packet, from the container's present position.

    Frames that cannot be decoded are left out. So are the frames after them, up to the next key frame, since these are
    predicted from them.

    Args:
        file, stream: opened.
        clip, packets: as `scan` found them.
        damage: learns what happens.
        is_start: whether the container stands at its beginning.
    """
    import av

    stream.codec_context.copy_opaque = True
    damaged: list[int] = []
    for number, packet in _numbered(file, stream, packets, is_start=is_start):
        if number is not None:
            if number < clip.first:
                continue
            packet.opaque = number
        try:
            frames = None if number in clip.lost else packet.decode()
        except av.error.EOFError:
            return
        except av.error.FFmpegError as error:  # which of its errors, a damaged header decides
            if isinstance(error, MemoryError):
                raise
            frames = None
        if frames is None:
            damage.is_seen = True
            damaged.append(_number_of_frame(packets, len(packets) - 1 if number is None else number))
        for frame in frames or ():
            if frame.opaque is None:  # made up by the decoder in the place of a lost one
                damage.is_seen = True
                continue
            if frame.is_corrupt:
                damage.is_seen = True
                damaged.append(frame.opaque)
            elif frame.key_frame:
                damaged = [number for number in damaged if number > frame.opaque]
            if all(number > frame.opaque for number in damaged):
                yield frame.opaque, frame


def _numbered(file: Any, stream: Any, packets: Sequence[Packet], *, is_start: bool) -> Iterator[tuple[int | None, Any]]:
    """Yield packets with their number in the file; None for the one without bytes that ends the file."""
    known = {} if is_start else {identity(packet): number for number, packet in enumerate(packets)}
    count = 0
    for packet in demux_all(file, stream):
        if not packet.size:
            yield None, packet
            continue
        number = count if is_start else known.get((packet.pos, packet.pts, packet.size), len(packets))
        if number >= len(packets):
            return  # seeking led elsewhere than the scan
        count += 1
        yield number, packet


def _number_of_frame(packets: Sequence[Packet], number: int) -> int:
    """Return the packet that begins the frame to which a packet, such as that of a second field, may belong."""
    while number and packets[number].is_hidden:
        number -= 1
    return number

"""Reads videos with PyAV: lists a container's frames, and decodes chosen ones. Runs in the sandbox child only.

Listing decodes only the first key frame, which carries the orientation of the picture. Every file is opened with one
allowed demuxer and with no protocol.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ItemError
from pipeline.loading.decoding.clip import Clip, Packet, check_duration, check_pixels, describe_clip, ends_early
from pipeline.loading.decoding.container import Container
from pipeline.loading.decoding.gop_ranges import GopSegment
from pipeline.loading.decoding.mp4_index import RangeReadUnsafeError
from pipeline.loading.decoding.nal import is_idr, is_random_access_point
from pipeline.loading.decoding.orientation import Orientation, orientation_of

if TYPE_CHECKING:
    from pipeline.config.schema import MediaConfig

_READ_BYTES = 1 << 18
_FIRST_PTS = -(1 << 63)


@contextmanager
def _opened(path: str, container: Container) -> Iterator[tuple[Any, Any]]:
    """Open a container and its video stream; with one demuxer and no protocol, no other file can be opened."""
    import av

    av.logging.set_level(None)
    only = {"protocol_whitelist": "", "format_whitelist": container}
    with open(path, "rb") as bytes_in:
        try:
            file = av.open(
                bytes_in, "r", format=container, options=only, buffer_size=_READ_BYTES, metadata_errors="replace"
            )
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            raise ItemError("corrupt_media", f"the {container} container cannot be read: {error.strerror}") from error
        with file:
            if not file.streams.video and not file.streams.audio:
                raise ItemError("corrupt_media", f"the {container} container lists neither pictures nor sound")
            stream = file.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise ItemError("no_video_stream", "the file has no video stream")
            if stream.codec_context is None:
                raise ItemError("unsupported_media", "there is no decoder for the codec of the video stream")
            stream.codec_context.thread_count = 1
            yield file, stream


def scan(path: str, container: Container, media: MediaConfig) -> tuple[Clip, list[Packet]]:
    """Check the budgets; return the description of every frame, and the packets in file order.

    Raises:
        ItemError: ``too_large``, ``no_video_stream``, ``unsupported_media``, ``corrupt_media`` or ``empty_media``.
    """
    with _opened(path, container) as (file, stream):
        check_pixels(stream.codec_context.width, stream.codec_context.height, most=media.max_pixels_per_frame)
        declared_s = (file.duration or 0) / 1e6
        check_duration(declared_s, most_s=media.max_duration_s)
        packets, end_s, orientation = _read_packets(file, stream)
        num_listed = {"mov": sum(entry.size > 0 for entry in stream.index_entries), "avi": stream.frames}
        clip = describe_clip(
            packets,
            container=container,
            codec=stream.codec_context.codec.canonical_name,
            time_base=stream.time_base,
            frame_rate=stream.average_rate,
            num_declared=num_listed.get(container, 0),
            problem_at_end=ends_early(end_s, declared_s),
            orientation=orientation,
            num_videos=len(file.streams.video),
        )
    check_duration(clip.timeline.timestamps_s[-1], most_s=media.max_duration_s)
    return clip, packets


def _read_packets(file: Any, stream: Any) -> tuple[list[Packet], float, Orientation]:
    """Return every packet of the stream, the time at which the last packet of any stream ends, and the orientation."""
    packets, end_s, start_s, first = [], 0.0, _start_s(file), None
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata
    keyframe_index = {entry.pos for entry in stream.index_entries if entry.is_keyframe}
    for packet in _demux(file):
        if not packet.size:
            continue
        if packet.dts is not None and not packet.is_corrupt:
            last = max(packet.dts, packet.pts if packet.pts is not None else packet.dts) + (packet.duration or 0)
            end_s = max(end_s, float(last * packet.time_base) - start_s)
        if packet.stream_index == stream.index:
            starts_gop = packet.is_keyframe and is_idr(bytes(packet), codec=codec, extradata=extradata)
            flags = packet.is_keyframe, starts_gop, packet.is_corrupt, packet.is_discard
            position = -1 if packet.pos is None else packet.pos
            packets.append(Packet(packet.pts, packet.dts, *flags, position in keyframe_index, position, packet.size))
            first = first or (packet if packet.is_keyframe else None)
    return packets, end_s, _first_orientation(first)


def _start_s(file: Any) -> float:
    """Return what must be subtracted from times to compare them with the declared duration.

    The declared duration counts from the first packet. In Matroska files that FFmpeg wrote it counts from zero; such a
    duration exceeds the start time.
    """
    start_s = (file.start_time or 0) / 1e6
    return 0.0 if "matroska" in file.format.name and (file.duration or 0) / 1e6 > start_s else start_s


def _first_orientation(key_packet: Any) -> Orientation:
    """Return the first key frame's orientation; upright where it cannot be decoded, which `read_pyav` then reports."""
    import av

    if key_packet is None or key_packet.is_corrupt:
        return Orientation()
    try:
        frames = [*key_packet.decode(), *key_packet.stream.codec_context.decode(None)]
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        return Orientation()
    return _orientation(frames[0]) if frames else Orientation()


def _orientation(frame: Any) -> Orientation:
    from av.sidedata.sidedata import Type

    for side_data in frame.side_data:
        if side_data.type == Type.DISPLAYMATRIX:
            return orientation_of(struct.unpack("=9i", bytes(side_data)[:36]))
    return Orientation()


def read_pyav(path: str, clip: Clip, wanted: Sequence[int], media: MediaConfig) -> dict[int, np.ndarray]:
    """Decode the wanted frames, by index; seek where seeking is exact, else decode from the start.

    Frames that cannot be decoded are left out.
    """
    found: dict[int, np.ndarray] = {}
    for seek_pts in (clip.seek_pts, {}):
        with _opened(path, clip.container) as (file, stream):
            decoded, position = _decode(file, stream, clip), -1
            for key, last in clip.gop_spans(wanted):
                if key > position + 1 and key in seek_pts:
                    file.seek(seek_pts[key], stream=stream)
                    decoded = _decode(file, stream, clip)
                for position, frame in decoded:
                    if position in wanted:
                        found[position] = _upright_rgb(frame, media)
                    if position >= last:
                        break
        if len(found) == len(wanted) or not seek_pts:  # else a frame that was skipped may have been needed
            break
    if len({frame.shape for frame in found.values()}) > 1:
        raise ItemError("unsupported_media", "the video changes its frame size midway")
    return found


def decode_segments(
    path: str, container: Container, found: Sequence[GopSegment], media: MediaConfig
) -> dict[int, np.ndarray]:
    """Decode the wanted frames, by index, from the bytes of these segments alone.

    Raises:
        RangeReadUnsafeError: the bytes are not what the index said, or a frame is not decoded whole without a warning.
    """
    import av

    frames: dict[int, np.ndarray] = {}
    with _opened(path, container) as (file, stream):
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
                        frames[one.wanted[frame.pts]] = _upright_rgb(frame, media)
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


def _decode(file: Any, stream: Any, clip: Clip) -> Iterator[tuple[int, Any]]:
    """Yield frames with their index, from the container's present position.

    Frames that cannot be decoded are left out. So are the frames after them, up to the next key frame, since these are
    predicted from them.
    """
    import av

    count, damaged_pts = 0, None
    for packet in _demux(file, stream):
        try:
            frames = None if packet.is_corrupt else packet.decode()
        except av.error.EOFError:
            return
        except av.error.InvalidDataError:
            frames = None
        if frames is None:
            if clip.order is None:
                return  # without times frames are counted: after a lost frame every index would be wrong
            damaged_pts = _FIRST_PTS if packet.pts is None else packet.pts
            continue
        for frame in frames:
            index = count if clip.order is None else clip.order.get(frame.pts)
            count += 1
            pts = _FIRST_PTS if frame.pts is None else frame.pts
            if frame.is_corrupt:
                damaged_pts = pts
            elif frame.key_frame and damaged_pts is not None and pts > damaged_pts:
                damaged_pts = None
            if index is not None and (damaged_pts is None or pts < damaged_pts):
                yield index, frame


def _demux(file: Any, *streams: Any) -> Iterator[Any]:
    """Yield packets until the file ends, early or not; the counts then show what is missing."""
    import av

    try:
        yield from file.demux(*streams)
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise


def _upright_rgb(frame: Any, media: MediaConfig) -> np.ndarray:
    check_pixels(frame.width, frame.height, most=media.max_pixels_per_frame)
    return _orientation(frame).apply(frame.to_ndarray(format="rgb24", threads=1))

"""Reads videos with PyAV: lists a container's frames, and decodes chosen ones. Runs in the sandbox child only.

Listing decodes only the first key frame, which carries the orientation of the picture. Every file is opened with one
allowed demuxer and with no protocol.
"""

from __future__ import annotations

import io
import os
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import ItemError
from pipeline.loading.decoding import mp4_boxes
from pipeline.loading.decoding.clip import Clip, Source, check_duration, check_pixels, describe_clip, identity
from pipeline.loading.decoding.container import Container
from pipeline.loading.decoding.frame_times import Packet
from pipeline.loading.decoding.gop_ranges import GopSegment
from pipeline.loading.decoding.mp4_index import RangeReadUnsafeError
from pipeline.loading.decoding.nal import is_idr, is_random_access_point, size_mark, stream_orientation
from pipeline.loading.decoding.orientation import UPRIGHT, Orientation, orientation_of
from pipeline.loading.decoding.shown_packets import is_frame_coded, packet_reader, sequence_sets

if TYPE_CHECKING:
    from pipeline.config.schema import MediaConfig

_READ_BYTES = 1 << 18
_MAX_FIRST_PACKETS = 2  # a frame may be two fields with a packet each


class _File(io.FileIO):
    """A file in which seeking to a place that cannot be, as damaged indexes ask for, leads to its end."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except (OSError, OverflowError):
            return super().seek(0, os.SEEK_END)


@contextmanager
def _opened(path: str, container: Container) -> Iterator[tuple[Any, Any]]:
    """Open a container and its video stream; with one demuxer and no protocol, no other file can be opened."""
    import av

    av.logging.set_level(None)
    only = {"protocol_whitelist": "", "format_whitelist": container}
    with _File(path, "rb") as bytes_in:
        try:
            file = av.open(
                bytes_in, "r", format=container, options=only, buffer_size=_READ_BYTES, metadata_errors="replace"
            )
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            if container == "mov" and mp4_boxes.is_encrypted(path):
                raise encrypted() from error
            raise ItemError("corrupt_media", f"the {container} container cannot be read: {error.strerror}") from error
        with file:
            if {one.type for one in file.streams} <= {"data"} and (
                not len(file.streams) or (container == "mov" and mp4_boxes.is_cut(path))
            ):
                raise ItemError("corrupt_media", f"the {container} container lists neither pictures nor sound")
            stream = file.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                there = ", ".join(sorted({one.type for one in file.streams if one is not stream})) or "a cover picture"
                raise ItemError("no_video_stream", f"the file has no video stream, but only: {there}")
            if "enc_key_id" in stream.metadata or (
                stream.codec_context is None and container == "mov" and mp4_boxes.is_encrypted(path)
            ):
                raise encrypted()
            if stream.codec_context is None:
                raise ItemError("unsupported_media", "there is no decoder for the codec of the video stream")
            stream.codec_context.thread_count = 1
            yield file, stream


def encrypted() -> ItemError:
    """Return the error of a video that needs a key."""
    return ItemError("encrypted_video", "the video is encrypted (DRM) and needs a key; export it without")


def scan(path: str, container: Container, media: MediaConfig) -> tuple[Clip, list[Packet]]:
    """Check the budgets; return the description of every frame, and the packets in file order.

    Raises:
        ItemError: ``too_large``, ``no_video_stream``, ``encrypted_video``, ``unsupported_media``, ``corrupt_media`` or
            ``empty_media``.
    """
    with _opened(path, container) as (file, stream):
        codec = stream.codec_context
        check_pixels(codec.width, codec.height, most=media.max_pixels_per_frame)
        declared_s = (file.duration or 0) / 1e6
        if container != "mpegts":  # which declares nothing: FFmpeg subtracts the file's first time from its last
            check_duration(declared_s, most_s=media.max_duration_s)
        num_indexed = sum(entry.size > 0 for entry in stream.index_entries) if container in {"mov", "avi"} else 0
        name, extradata = codec.codec.canonical_name, codec.extradata
        found = _read_packets(file, stream)
        source = Source(
            container,
            name,
            stream.time_base,
            frame_rate=stream.average_rate,
            declared_s=declared_s,
            num_declared=_num_in_cut_avi(stream.frames, found.packets) if _is_cut_avi(path, container) else num_indexed,
            num_videos=len(file.streams.video),
            orientation=found.orientation,
            is_turned_in_stream=found.is_turned_in_stream,
            may_change_size=found.may_change_size,
            needs_bytes=name == "h264" and not is_frame_coded(extradata),
        )
    clip = describe_clip(found.packets, source, end_s=found.end_s)
    check_duration(clip.timeline.timestamps_s[-1], most_s=media.max_duration_s)
    return clip, found.packets


def list_frames(path: str, clip: Clip, packets: Sequence[Packet]) -> Clip:
    """Describe a clip anew by the frames that the decoder gives; it decodes all of it, or only the part that is unsure.

    The clip is returned as it is where a frame of that part is damaged.
    """
    end = clip.unsure_until or len(packets)
    given, damage = set(range(end, len(packets))), Damage()
    with _opened(path, clip.source.container) as (file, stream):
        for number, _ in _decode(file, stream, clip, packets, damage):
            given.add(number)
            if number >= end:
                break
    return clip if damage.is_seen else describe_clip(packets, clip.source, end_s=clip.end_s, decoded=given)


def _is_cut_avi(path: str, container: Container) -> bool:
    """Whether an AVI file ends before its outermost chunk does; its index then is lost."""
    with open(path, "rb") as file:
        return container == "avi" and int.from_bytes(file.read(8)[4:], "little") + 8 > os.path.getsize(path)


def _num_in_cut_avi(num_chunks: int, packets: Sequence[Packet]) -> int:
    """Return how many packets there should be: the times count chunks, and a chunk of no bytes repeats a frame."""
    last = max((packet.dts for packet in packets if packet.dts is not None), default=-1)
    return len(packets) + max(0, num_chunks - 1 - last)


class _Scanned(NamedTuple):
    """Holds every packet of the stream, when the last packet of any stream ends, and what `Source` says of the rest."""

    packets: list[Packet]
    end_s: float
    orientation: Orientation
    is_turned_in_stream: bool
    may_change_size: bool


def _read_packets(file: Any, stream: Any) -> _Scanned:
    """Read the whole file once.

    Raises:
        ItemError: ``unsupported_media`` where the stream gives several orientations, ``encrypted_video``.
    """
    packets: list[Packet] = []
    first: list[Any] = []
    end_s, start_s = 0.0, _start_s(file)
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata
    keyframe_index = {entry.pos for entry in stream.index_entries if entry.is_keyframe}
    shows = packet_reader(codec, extradata)
    orientations: list[bytes | None] = []
    sizes: set[Any] = set(sequence_sets(extradata) if codec == "h264" else ())
    for packet in _demux(file):
        if not packet.size:
            continue
        if packet.dts is not None and not packet.is_corrupt:
            last = max(packet.dts, packet.pts if packet.pts is not None else packet.dts) + (packet.duration or 0)
            end_s = max(end_s, float(last * packet.time_base) - start_s)
        if packet.stream_index != stream.index:
            continue
        if packet.has_sidedata("encryption_info"):  # ISO/IEC 23001-7 (CENC)
            raise encrypted()
        data = bytes(packet) if shows or packet.is_keyframe or codec == "hevc" else b""
        starts_gop = packet.is_keyframe and is_idr(data, codec=codec, extradata=extradata)
        flags = packet.is_keyframe, starts_gop, packet.is_corrupt, packet.is_discard
        position = -1 if packet.pos is None else packet.pos
        is_hidden = shows is not None and not shows(data)
        indexed = position in keyframe_index
        packets.append(Packet(packet.pts, packet.dts, *flags, indexed, position, packet.size, is_hidden))
        if first or packet.is_keyframe:
            orientations.append(stream_orientation(data, codec=codec, extradata=extradata))
            if packet.is_keyframe:
                sizes.add(size_mark(data, codec=codec, extradata=extradata))
            if len(first) < _MAX_FIRST_PACKETS:
                first.append(packet)
    given = {message for message in orientations if message}
    if len(given) > 1 or (given and not orientations[0]):
        raise ItemError("unsupported_media", "the stream turns its picture midway; no one orientation shows it upright")
    return _Scanned(packets, end_s, _first_orientation(first), bool(given), len(sizes - {None}) > 1)


def _start_s(file: Any) -> float:
    """Return what must be subtracted from times to compare them with the declared duration.

    The declared duration counts from the first packet. In Matroska files that FFmpeg wrote it counts from zero; such a
    duration exceeds the start time.
    """
    start_s = (file.start_time or 0) / 1e6
    return 0.0 if "matroska" in file.format.name and (file.duration or 0) / 1e6 > start_s else start_s


def _first_orientation(packets: Sequence[Any]) -> Orientation:
    """Return the orientation of the frame that the first key frame's packet gives, perhaps with the one after it.

    Upright where these cannot be decoded, which `read_pyav` then reports.
    """
    import av

    try:
        for packet in packets:
            if packet.is_corrupt:
                break
            if frames := [*packet.decode(), *packet.stream.codec_context.decode(None)]:
                return _orientation(frames[0])
            packet.stream.codec_context.flush_buffers()
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
    return UPRIGHT


def _orientation(frame: Any) -> Orientation:
    """Read a frame's display matrix; whatever else the frame carries is passed over."""
    from av.sidedata.sidedata import Type

    Type._missing_ = classmethod(_unnamed)  # type: ignore[assignment,method-assign]
    for side_data in frame.side_data:
        if side_data.type == Type.DISPLAYMATRIX:
            return orientation_of(struct.unpack("=9i", bytes(side_data)[:36]))
    return UPRIGHT


def _unnamed(names: Any, value: int) -> Any:
    """Let PyAV list side data of a type for which it has no name: it lists all of a frame, or raises."""
    member = object.__new__(names)
    member._name_, member._value_ = f"TYPE_{value}", value
    return member


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
        with _opened(path, clip.source.container) as (file, stream):
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
                        found[position] = _rgb(frame, clip.source.orientation, media)
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
                        frames[one.wanted[frame.pts]] = _rgb(frame, _orientation(frame), media)
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
    for packet in _demux(file, stream):
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


def _demux(file: Any, *streams: Any) -> Iterator[Any]:
    """Yield packets until the file ends, early or not; the counts then show what is missing."""
    import av

    try:
        yield from file.demux(*streams)
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise


def _rgb(frame: Any, orientation: Orientation, media: MediaConfig) -> np.ndarray:
    check_pixels(frame.width, frame.height, most=media.max_pixels_per_frame)
    return orientation.apply(frame.to_ndarray(format="rgb24", threads=1))

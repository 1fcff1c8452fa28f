"""Lists the packets of a video with PyAV. Decodes only the first key frame, which carries the picture's orientation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import ItemError
from pipeline.loading.decoding.pyav_file import demux_all, encrypted, opened, orientation_in
from pipeline.loading.video_index.clip import Clip, Source, check_duration, check_pixels, describe_clip
from pipeline.loading.video_index.container import Container
from pipeline.loading.video_index.frame_times import Packet
from pipeline.loading.video_index.nal import is_idr, size_mark, stream_orientation
from pipeline.loading.video_index.orientation import UPRIGHT, Orientation
from pipeline.loading.video_index.shown_packets import is_frame_coded, packet_reader, sequence_sets

if TYPE_CHECKING:
    from pipeline.config.schema import MediaConfig

_MAX_FIRST_PACKETS = 2  # a frame may be two fields with a packet each


def scan(path: str, container: Container, media: MediaConfig) -> tuple[Clip, list[Packet]]:
    """Check the budgets; return the description of every frame, and the packets in file order.

    Raises:
        ItemError: ``too_large``, ``no_video_stream``, ``encrypted_video``, ``unsupported_media``, ``corrupt_media`` or
            ``empty_media``.
    """
    with opened(path, container) as (file, stream):
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
    for packet in demux_all(file):
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
                return orientation_in(frames[0])
            packet.stream.codec_context.flush_buffers()
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
    return UPRIGHT

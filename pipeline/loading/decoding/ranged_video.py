"""Reads a video of which only some bytes are present: names the bytes that are needed, then decodes the chosen frames.

Runs in the sandbox child. The file has its full size and its whole index, so FFmpeg lists the same frames as in the
whole file. PyAV alone decodes it, since PyAV can be kept from reading absent bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.loading.decoding.media import Frames
from pipeline.loading.decoding.pyav_scan import scan
from pipeline.loading.decoding.pyav_video import decode_segments
from pipeline.loading.video_index.clip import Clip
from pipeline.loading.video_index.container import HEAD_BYTES, sniff
from pipeline.loading.video_index.frame_sampling import choose_frames
from pipeline.loading.video_index.frame_times import Packet
from pipeline.loading.video_index.gop_ranges import GopSegment, byte_ranges, gop_segments, is_covered
from pipeline.loading.video_index.mp4_index import RangeReadUnsafeError
from pipeline.loading.video_index.packet_bytes import packet_bytes

if TYPE_CHECKING:
    from pipeline.config.schema import MediaConfig

_MAX_SHARE = 0.6  # where more than this share of the object is needed, one request for all of it is cheaper


def needed_ranges(path: str, media: MediaConfig) -> list[tuple[int, int]]:
    """Return half-open byte ranges of the file that hold the chosen frames.

    Args:
        path: a file of full size that holds at least the bytes that `mp4_index.fetch_index` reads.
        media: sampling and budgets.

    Raises:
        RangeReadUnsafeError: the whole object must be read.
        ItemError: as for the whole file, or because bytes are absent: only the whole file can confirm the error.
    """
    _, _, found, _ = survey(path, media)
    ranges = byte_ranges(found)
    if sum(end - start for start, end in ranges) > _MAX_SHARE * os.path.getsize(path):
        raise RangeReadUnsafeError("most of its bytes are needed")
    return ranges


def load_present(path: str, media: MediaConfig, present: Sequence[Sequence[int]]) -> Frames:
    """Decode the chosen frames, all of them and none damaged.

    Args:
        path: as in `needed_ranges`, with the needed ranges filled.
        media: sampling and budgets.
        present: the ranges that are filled.

    Raises:
        RangeReadUnsafeError: a frame needs other bytes than the present ones, or is not decoded whole.
        ItemError: as in `needed_ranges`.
    """
    clip, packets, found, wanted = survey(path, media)
    needed = [(packet.position, packet.position + packet.num_bytes) for one in found for packet in one.packets]
    if not is_covered(needed, [(start, end) for start, end in present]):
        raise RangeReadUnsafeError("its index reads otherwise with the frames in place")
    frames = decode_segments(path, clip.source.container, found, media)
    if len(frames) != len(wanted) or len({frame.shape for frame in frames.values()}) != 1:
        raise RangeReadUnsafeError(f"{len(frames)} of {len(wanted)} frames came, or of several sizes")
    times_s = tuple(clip.timeline.timestamps_s[index] for index in wanted)
    sizes = packet_bytes(packets, clip, wanted)
    return Frames([frames[index] for index in wanted], times_s, "pyav", packet_bytes=sizes)


def survey(path: str, media: MediaConfig) -> tuple[Clip, list[Packet], list[GopSegment], tuple[int, ...]]:
    """Return the clip, its packets, the segments to decode, and the chosen frames. Raises as `needed_ranges`."""
    if media.frame_sampling.kind == "keyframe":
        raise RangeReadUnsafeError("which frames are key frames is seen in their bytes alone")
    with open(path, "rb") as file:
        container = sniff(file.read(HEAD_BYTES))
    clip, packets = scan(path, container, media)
    wanted = choose_frames(clip.timeline, media.frame_sampling, num_frames=media.num_frames)
    if not wanted:
        raise RangeReadUnsafeError("no frame was chosen")
    return clip, packets, gop_segments(packets, clip, wanted), wanted

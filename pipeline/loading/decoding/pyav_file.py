"""Opens a video with PyAV: with one allowed demuxer and no protocol, in words where it cannot be read."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ItemError
from pipeline.loading.video_index import mp4_boxes
from pipeline.loading.video_index.clip import check_pixels
from pipeline.loading.video_index.container import Container
from pipeline.loading.video_index.orientation import UPRIGHT, Orientation, orientation_of

if TYPE_CHECKING:
    from pipeline.config.schema import MediaConfig

_READ_BYTES = 1 << 18


class _File(io.FileIO):
    """A file in which seeking to a place that cannot be, as damaged indexes ask for, leads to its end."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except (OSError, OverflowError):
            return super().seek(0, os.SEEK_END)


@contextmanager
def opened(path: str, container: Container) -> Iterator[tuple[Any, Any]]:
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


def demux_all(file: Any, *streams: Any) -> Iterator[Any]:
    """Yield packets until the file ends, early or not; the counts then show what is missing."""
    import av

    try:
        yield from file.demux(*streams)
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise


def orientation_in(frame: Any) -> Orientation:
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


def upright_rgb(frame: Any, orientation: Orientation, media: MediaConfig) -> np.ndarray:
    """Return a frame's pixels the right way up: [height, width, 3], uint8."""
    check_pixels(frame.width, frame.height, most=media.max_pixels_per_frame)
    return orientation.apply(frame.to_ndarray(format="rgb24", threads=1))

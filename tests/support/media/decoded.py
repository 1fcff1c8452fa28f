"""Decodes every frame of a video with PyAV alone: what the readers' choices of frames are compared with."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np


def every_frame(path: str | Path) -> list[tuple[int | None, np.ndarray]]:
    """Each frame's own time, in the stream's time base, and its pixels, as coded; packets that fail are passed over."""
    found: list[tuple[int | None, np.ndarray]] = []
    with av.open(io.BytesIO(Path(path).read_bytes())) as file:
        stream = file.streams.best("video")
        stream.codec_context.thread_count = 1
        for packet in file.demux(stream):
            try:
                frames = packet.decode()
            except (av.error.InvalidDataError, av.error.EOFError):
                continue
            found += [(frame.pts, frame.to_ndarray(format="rgb24", threads=1)) for frame in frames]
    return found

"""Reads a local video as from a store, by ranges, for tests of ranged reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.config.schema import MediaConfig
from pipeline.loading.decoding.media import Frames
from pipeline.loading.decoding.ranged_video import load_present, needed_ranges
from pipeline.loading.sparse_file import SparseCopy
from pipeline.loading.video_index.mp4_index import fetch_index
from pipeline.storage import storage


def ranged(path: str | Path, media: MediaConfig) -> tuple[Frames, SparseCopy]:
    """The chosen frames, and the copy they came from, from those bytes alone; raises `RangeReadUnsafeError`."""
    info = storage.stat(str(path))
    copy = SparseCopy(f"{path}.sparse", info.uri, info.size, info.etag)
    try:

        def read(start: int, end: int) -> bytes:
            copy.fetch(copy.missing([(start, end)]))
            return copy.read(start, end)

        fetch_index(read, info.size)
        copy.fetch(copy.missing(needed_ranges(copy.path, media)))
        return load_present(copy.path, media, copy.present), copy
    finally:
        Path(copy.path).unlink()


def assert_same(frames: Frames, expected: Frames) -> None:
    """Times, sizes of packets and every pixel."""
    assert frames.timestamps_s == expected.timestamps_s
    assert frames.packet_bytes == expected.packet_bytes
    assert len(frames.packet_bytes) in (0, len(frames.frames))
    assert (frames.partial, expected.partial) == (None, None)
    for one, other in zip(frames.frames, expected.frames, strict=True):
        np.testing.assert_array_equal(one, other)

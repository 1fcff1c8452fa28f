"""Loads a video from the few bytes that hold its chosen frames: the index first, then their groups of pictures.

This is the parent's side: the parent fetches, and the child decides which bytes are needed (`ranged_video`). Where a
ranged read is unsafe, the caller reads the whole object.
"""

from __future__ import annotations

from pipeline.errors import ItemError
from pipeline.loading.load_report import LoadMeter
from pipeline.loading.sandbox.child import DecordFailedError
from pipeline.loading.sandbox.client import DecodedMedia, DecoderProcess
from pipeline.loading.sparse_file import SparseCopy
from pipeline.loading.staging import Staging
from pipeline.loading.video_index.mp4_index import RangeReadUnsafeError, fetch_index


def load_by_ranges(copy: SparseCopy, staging: Staging, decoder: DecoderProcess, meter: LoadMeter) -> DecodedMedia:
    """Decode and preprocess the chosen frames of a video that is fetched in parts.

    Args:
        copy: made by `Staging.sparse`.
        staging: fetches ranges into the copy.
        decoder: the child.
        meter: measures this load. Later tries have the time that this one leaves.

    Raises:
        RangeReadUnsafeError: the whole object must be read. This includes every error of the child about this file.
        ItemError: an error of the store, such as ``changed_object``; or ``load_timeout``.
    """

    def fill(ranges: list[tuple[int, int]]) -> None:
        with meter.fetching():
            staging.fill(copy, ranges)

    def read(start: int, end: int) -> bytes:
        fill([(start, end)])
        return copy.read(start, end)

    fetch_index(read, copy.size)
    try:
        with meter.child() as deadline_s:
            needed = decoder.needed_ranges(copy.path, deadline_s=deadline_s)
    except (ItemError, DecordFailedError) as error:
        raise _unless_timed_out(error) from error
    if any(not 0 <= start < end <= copy.size for start, end in needed):
        raise RangeReadUnsafeError("its index names bytes outside the object")
    fill(needed)
    try:
        with meter.child() as deadline_s:
            return decoder.load("video", [copy.path], decoder="pyav", deadline_s=deadline_s, present=copy.present)
    except (ItemError, DecordFailedError) as error:
        raise _unless_timed_out(error) from error


def _unless_timed_out(error: Exception) -> Exception:
    """Return a timeout as it is. Every other error of the child may come from missing bytes, so the read is unsafe."""
    return (
        error
        if isinstance(error, ItemError) and error.error_type == "load_timeout"
        else RangeReadUnsafeError(str(error))
    )

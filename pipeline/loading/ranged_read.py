"""A video loaded from the few bytes that hold its chosen frames: the index first, then their groups of pictures.

The parent's side: it fetches, the child decides which bytes (`ranged_video`). Where any doubt is left, the caller reads
the whole object. Knows no decoder and no row.
"""

from __future__ import annotations

from pipeline.errors import ItemError
from pipeline.loading.decoding.mp4_index import RangeReadUnsafeError, fetch_index
from pipeline.loading.load_report import LoadMeter
from pipeline.loading.sandbox.child import DecordFailedError
from pipeline.loading.sandbox.client import DecodedMedia, DecoderProcess
from pipeline.loading.sparse_file import SparseCopy
from pipeline.loading.staging import Staging


def load_by_ranges(copy: SparseCopy, staging: Staging, decoder: DecoderProcess, meter: LoadMeter) -> DecodedMedia:
    """Decode and preprocess the chosen frames of a video that is fetched in parts.

    Args:
        copy: of `Staging.sparse`.
        staging: fetches into it.
        decoder: the child.
        meter: of this load, whose later tries have what this one leaves.

    Raises:
        RangeReadUnsafeError: the whole object must be read; also for whatever the child said of this file.
        ItemError: from the store, ``changed_object`` among them, or ``load_timeout``.
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
        raise _doubt(error) from error
    if any(not 0 <= start < end <= copy.size for start, end in needed):
        raise RangeReadUnsafeError("its index names bytes outside the object")
    fill(needed)
    try:
        with meter.child() as deadline_s:
            return decoder.load("video", [copy.path], decoder="pyav", deadline_s=deadline_s, present=copy.present)
    except (ItemError, DecordFailedError) as error:
        raise _doubt(error) from error


def _doubt(error: Exception) -> Exception:
    """A deadline that passed is not tried again; anything else the child says may come from what is not there."""
    return (
        error
        if isinstance(error, ItemError) and error.error_type == "load_timeout"
        else RangeReadUnsafeError(str(error))
    )

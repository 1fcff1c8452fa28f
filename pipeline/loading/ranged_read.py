"""A video loaded from the few bytes that hold its chosen frames: the index first, then their groups of pictures.

The parent's side: it fetches, the child decides which bytes (`ranged_video`). Where any doubt is left, the caller reads
the whole object. Knows no decoder and no row.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from pipeline.errors import ItemError
from pipeline.loading.child_process import DecordFailedError
from pipeline.loading.decoder_process import DecodedMedia, DecoderProcess
from pipeline.loading.mp4_index import DoubtError, fetch_index
from pipeline.loading.sparse_copy import SparseCopy
from pipeline.loading.staging import Staging


@dataclass(frozen=True, slots=True)
class RangedLoad:
    """What came of it, and how long the store took."""

    decoded: DecodedMedia
    fetch_s: float


def load_by_ranges(copy: SparseCopy, staging: Staging, decoder: DecoderProcess, *, timeout_s: float) -> RangedLoad:
    """Decode and preprocess the chosen frames of a video that is fetched in parts.

    Args:
        copy: of `Staging.sparse`.
        staging: fetches into it.
        decoder: the child.
        timeout_s: of the child, in all.

    Raises:
        DoubtError: the whole object must be read; also for whatever the child said of this file.
        ItemError: from the store, ``changed_object`` among them, or ``load_timeout``.
    """
    fetch_s = 0.0

    def fill(ranges: list[tuple[int, int]]) -> None:
        nonlocal fetch_s
        began_s = time.perf_counter()
        staging.fill(copy, ranges)
        fetch_s += time.perf_counter() - began_s

    def read(start: int, end: int) -> bytes:
        fill([(start, end)])
        return copy.read(start, end)

    fetch_index(read, copy.size)
    began_s = time.monotonic()
    try:
        needed = decoder.needed_ranges(copy.path, deadline_s=began_s + timeout_s)
    except (ItemError, DecordFailedError) as error:
        raise _doubt(error) from error
    left_s = timeout_s - (time.monotonic() - began_s)
    if any(not 0 <= start < end <= copy.size for start, end in needed.ranges):
        raise DoubtError("its index names bytes outside the object")
    fill(needed.ranges)
    try:
        decoded = decoder.load(
            "video", [copy.path], decoder="pyav", deadline_s=time.monotonic() + left_s, present=copy.present
        )
    except (ItemError, DecordFailedError) as error:
        raise _doubt(error) from error
    return RangedLoad(replace(decoded, cpu_s=decoded.cpu_s + needed.cpu_s), fetch_s)


def _doubt(error: Exception) -> Exception:
    """A deadline that passed is not tried again; anything else the child says may come from what is not there."""
    return error if isinstance(error, ItemError) and error.error_type == "load_timeout" else DoubtError(str(error))

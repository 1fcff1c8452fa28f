"""Fetches the index of an mp4 or mov file, reading little more than that index.

Only the outermost boxes are walked: FFmpeg, in the child, interprets the index. Anything unusual makes the ranged read
unsafe, and the caller reads the whole object.
"""

from __future__ import annotations

from collections.abc import Callable

_FIRST_BYTES = 1 << 12  # the headers in front; an index that follows them is then read exactly
_NEXT_BYTES = 1 << 15  # after the media: mostly the whole index, which ends the file
_MAX_BOXES = 64
_MAX_INDEX_BYTES = 1 << 26
_HARMLESS = frozenset({b"ftyp", b"free", b"skip", b"wide", b"mdat"})
_UNSUPPORTED_IN_INDEX = {b"mvex": "fragmented", b"cmov": "with a compressed index"}


class RangeReadUnsafeError(Exception):
    """A ranged read cannot be shown to give what the whole object gives; the message says why."""


def fetch_index(read: Callable[[int, int], bytes], size: int) -> None:
    """Read the header of every outermost box, and the whole of `ftyp` and `moov`.

    Args:
        read: returns the bytes of a half-open range, and keeps them.
        size: bytes of the file.

    Raises:
        RangeReadUnsafeError: the file is fragmented, cut short, or has a box that may matter elsewhere.
    """
    start, buffer, place, found = 0, b"", 0, []
    for _ in range(_MAX_BOXES):
        if place >= size:
            break
        if place + 16 > start + len(buffer) and start + len(buffer) < size:
            length = _NEXT_BYTES if place else _FIRST_BYTES
            start, buffer = place, read(place, min(size, place + length))
        kind, end = _box(buffer[place - start :], place, size)
        found.append(kind)
        if kind in {b"ftyp", b"moov"}:
            if end - place > _MAX_INDEX_BYTES:
                raise RangeReadUnsafeError(f"its {kind.decode()} has {end - place:,} bytes")
            have = start + len(buffer)
            if have < end:
                start, buffer = place, buffer[place - start :] + read(have, end)
            if kind == b"moov":
                _check_index(buffer[place - start : end - start])
        place = end
    if place != size or found.count(b"moov") != 1 or b"mdat" not in found or found[0] != b"ftyp":
        raise RangeReadUnsafeError("its boxes are not one ftyp, one moov and the media")


def _box(buffer: bytes, place: int, size: int) -> tuple[bytes, int]:
    """Return kind and end of the box that begins at ``place``; ``buffer`` begins with the box's header."""
    if len(buffer) < 8:
        raise RangeReadUnsafeError("bytes are left behind its last box")
    length, kind, header = int.from_bytes(buffer[:4]), buffer[4:8], 8
    if kind != b"moov" and kind not in _HARMLESS:
        raise RangeReadUnsafeError(f"it has a box {kind!r}")
    if length == 1:
        length, header = int.from_bytes(buffer[8:16]), 16
    if length == 0 and kind == b"mdat":
        length = size - place
    if length < header or place + length > size:
        raise RangeReadUnsafeError(f"its box {kind!r} has {length:,} bytes, of {size - place:,} that are left")
    return kind, place + length


def _check_index(moov: bytes) -> None:
    place = 16 if moov[:4] == b"\x00\x00\x00\x01" else 8
    while place + 8 <= len(moov):
        length, kind = int.from_bytes(moov[place : place + 4]), moov[place + 4 : place + 8]
        if kind in _UNSUPPORTED_IN_INDEX:
            raise RangeReadUnsafeError(f"it is {_UNSUPPORTED_IN_INDEX[kind]}")
        if length < 8 or place + length > len(moov):
            raise RangeReadUnsafeError(f"its index has a box {kind!r} of {length:,} bytes")
        place += length

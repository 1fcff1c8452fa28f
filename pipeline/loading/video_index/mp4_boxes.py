"""Looks for what FFmpeg does not say of an mp4 or mov file that it cannot read: encrypted, or cut short."""

from __future__ import annotations

import mmap
import os

_ENCRYPTED_ENTRIES = (b"encv", b"drmi")  # ISO/IEC 23001-7 (CENC), and FairPlay


def is_encrypted(path: str) -> bool:
    """Whether the first sample entry of a track is one of encrypted media."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = -1
        while (place := data.find(b"stsd", place + 1)) >= 0:
            if data[place + 16 : place + 20] in _ENCRYPTED_ENTRIES:
                return True
    return False


def is_cut(path: str) -> bool:
    """Whether the file ends before its last outermost box does."""
    size, place = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while place + 8 <= size:
            file.seek(place)
            head = file.read(16)
            length = int.from_bytes(head[:4])
            if length == 1:
                length = int.from_bytes(head[8:16])
            if length == 0:  # up to the end
                return False
            if length < 8:
                return True
            place += length
    return place > size

"""Recognises a video's container by the first bytes of the file. Four containers are read; all others are refused.

Names and extensions are never trusted.
"""

from __future__ import annotations

from typing import Literal

from pipeline.errors import ItemError

Container = Literal["mov", "matroska", "avi", "mpegts"]

HEAD_BYTES = 4096  # what `sniff` needs

_MOV_ATOMS = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})
_PICTURE_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1", b"crx "})
_EBML, _EBML_HEADER_BYTES = b"\x1a\x45\xdf\xa3", 128
_REFUSED = (
    (b"#EXTM3U", "a playlist"),
    (b"ffconcat", "a concat script"),
    (b"v=0", "an SDP file"),
    (b"<?xml", "an XML file"),
    (b"<MPD", "a DASH manifest"),
    (b"[playlist]", "a playlist"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"%PDF", "a PDF document"),
    (b"ID3", "an MP3 file"),
)


def sniff(head: bytes) -> Container:
    """Return the container of a video file, given its first `HEAD_BYTES`.

    Raises:
        ItemError: ``empty_media`` for zero bytes, ``unsupported_media`` for anything but the four containers,
            ``encrypted_video`` for a scrambled transport stream, in which FFmpeg would find nothing.
    """
    if not head:
        raise ItemError("empty_media", "the file has zero bytes")
    if head[4:8] in _MOV_ATOMS:
        if head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS:
            raise _refusal(f"a picture (brand {head[8:12].decode().strip()})")
        return "mov"
    if head.startswith(_EBML):
        # In other EBML files FFmpeg may rather recognise a text that names what to fetch.
        if not any(name in head[:_EBML_HEADER_BYTES] for name in (b"matroska", b"webm")):
            raise _refusal("an EBML file that is neither Matroska nor WebM")
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi"
    if (grid := _ts_grid(head)) is not None:
        if any(head[place + 3] & 0xC0 for place in range(grid[0], len(head) - 3, grid[1])):
            raise ItemError("encrypted_video", "the transport stream is encrypted (scrambled) and needs a key")
        return "mpegts"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, what in _REFUSED:
        if text.startswith(magic):
            raise _refusal(what)
    raise _refusal(f"of an unknown kind (first bytes {head[:12].hex(' ')})")


def _ts_grid(head: bytes) -> tuple[int, int] | None:
    """Return place and distance of at least three sync bytes: 188, or 192 with a time stamp of 4 bytes before each."""
    for first, step in _TS_GRIDS:
        if len(head) > first + 2 * step and all(byte == 0x47 for byte in head[first::step]):
            return first, step
    return None


_TS_GRIDS = ((0, 188), (4, 192))


def _refusal(what: str) -> ItemError:
    return ItemError(
        "unsupported_media", f"the file is {what}; videos are read from mp4/mov, mkv/webm, avi and mpegts containers"
    )

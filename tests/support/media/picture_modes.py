"""Writes pictures of every sample depth and photometric meaning that TIFF and PNG have: four pixels, dark to bright."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

from tests.support.media.adversarial_pictures import chunk, encoded, png

GREY, RGB, PALETTE, CMYK, YCBCR, CIELAB = 1, 2, 3, 5, 6, 8
LEVELS = (0.0, 64 / 255, 191 / 255, 1.0)  # whole numbers in 8 and in 16 bits


def packed(samples: Sequence[int], bits: int, *, big: bool = False) -> bytes:
    """Samples of so many bits one after the other; whole bytes in the file's order."""
    if bits in {8, 16, 32}:
        return np.asarray(samples, f"{'>' if big else '<'}u{bits // 8}").tobytes()
    text = "".join(f"{sample:0{bits}b}" for sample in samples)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8))


def tiff(
    samples: Sequence[int] | bytes,
    *,
    bits: Sequence[int] = (8,),
    photometric: int = GREY,
    big: bool = False,
    **tags: int | Sequence[int],
) -> bytes:
    """A TIFF of one strip with four pixels. ``tags`` are named ``t`` and their number; their values are shorts."""
    order = ">" if big else "<"
    data = samples if isinstance(samples, bytes) else packed(samples, bits[0], big=big)
    entries: dict[int, tuple[int, Sequence[int]]] = {
        256: (3, (4,)), 257: (3, (1,)), 258: (3, bits), 259: (3, (1,)), 262: (3, (photometric,)), 273: (4, (8,)),
        277: (3, (len(bits),)), 278: (3, (1,)), 279: (4, (len(data),)),
    }  # fmt: skip
    for name, value in tags.items():
        entries[int(name[1:])] = 3, (value,) if isinstance(value, int) else value
    data += bytes(len(data) % 2)
    directory = 8 + len(data)
    extra_at, extra = directory + 2 + 12 * len(entries) + 4, b""
    body = struct.pack(f"{order}H", len(entries))
    for tag, (kind, values) in sorted(entries.items()):
        raw = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        field = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(f"{order}I", extra_at + len(extra))
        extra += raw if len(raw) > 4 else b""
        body += struct.pack(f"{order}HHI", tag, kind, len(values)) + field
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", directory)
    return head + data + body + bytes(4) + extra


def png_of(samples: Sequence[int], depth: int, colour: int, *chunks: bytes) -> bytes:
    """A PNG with four pixels."""
    row = b"\0" + packed(samples, depth, big=True)
    return png(4, 1, *chunks, chunk(b"IDAT", zlib.compress(row)), depth=depth, colour=colour)


def levels(bits: int) -> list[int]:
    """The four levels in that depth."""
    return [round(level * ((1 << bits) - 1)) for level in LEVELS]


def _grey_tiffs() -> dict[str, bytes]:
    found = {}
    for bits in (1, 2, 4, 8, 12, 16, 32):
        found[f"grey-{bits}.tif"] = tiff(levels(bits), bits=(bits,))
        if bits not in {12, 32}:
            found[f"white-is-zero-{bits}.tif"] = tiff(levels(bits), bits=(bits,), photometric=0)
    found["grey-16-big.tif"] = tiff(levels(16), bits=(16,), big=True)
    return found


def _colours(bits: int) -> list[int]:
    full, half = (1 << bits) - 1, round(128 / 255 * ((1 << bits) - 1))
    return [full, 0, 0, 0, full, half, half, half, full, full, full, full]


def _colours_and(bits: int, *others: int) -> list[int]:
    pixels = np.array(_colours(bits)).reshape(4, 3)
    return np.column_stack([pixels, *(np.full(4, other) for other in others)]).ravel().tolist()


_PALETTE = [*(0, 65535, 0, 32896), *(0, 0, 65535, 32896), *(65535, 0, 0, 32896)]
_GREY_ALPHA = [0, 255, 64, 255, 191, 255, 255, 0]

_SIXTEEN = [*_PALETTE[:4], *(0,) * 12, *_PALETTE[4:8], *(0,) * 12, *_PALETTE[8:], *(0,) * 12]
_SPOTS = [0, 65535, 65535, 0, 65535, 0, 65535, 0, 0, 0, 0, 32896, 0, 0, 0, 0]
_EARLY = [128, 0, 0, 128, 0, 64, 0, 64, 9, 9, 9, 255, 0, 0, 0, 0]
_LUMA = [76, 85, 255, 150, 44, 21, 29, 255, 107, 255, 128, 128]
_PLTE = chunk(b"PLTE", bytes([0, 0, 255, 255, 0, 0, 0, 255, 0, 128, 128, 128]))

# Read; the right values stand in test_picture_modes.py.
READ = {
    **_grey_tiffs(),
    "grey-alpha.tif": tiff(_GREY_ALPHA, bits=(8, 8), t338=2),
    "grey-unused.tif": tiff(_GREY_ALPHA, bits=(8, 8), t338=0),
    "rgb-8.tif": tiff(_colours(8), bits=(8,) * 3, photometric=RGB),
    "rgb-16.tif": tiff(_colours(16), bits=(16,) * 3, photometric=RGB),
    "rgb-16-big.tif": tiff(_colours(16), bits=(16,) * 3, photometric=RGB, big=True),
    "rgba-8.tif": tiff(_colours_and(8, 0), bits=(8,) * 4, photometric=RGB, t338=2),
    "rgba-16.tif": tiff(_colours_and(16, 65535), bits=(16,) * 4, photometric=RGB, t338=2),
    "rgba-premultiplied.tif": tiff(_EARLY, bits=(8,) * 4, photometric=RGB, t338=1),
    "rgb-unused.tif": tiff(_colours_and(8, 0), bits=(8,) * 4, photometric=RGB, t338=0),
    "rgb-two-unused.tif": tiff(_colours_and(8, 0, 9), bits=(8,) * 5, photometric=RGB, t338=(0, 0)),
    "palette-2.tif": tiff([0, 1, 2, 3], bits=(2,), photometric=PALETTE, t320=_PALETTE),
    "palette-4.tif": tiff([0, 1, 2, 3], bits=(4,), photometric=PALETTE, t320=_SIXTEEN),
    "cmyk-8.tif": tiff([0, 255, 255, 0, 255, 0, 255, 0, 0, 0, 0, 128, 0, 0, 0, 0], bits=(8,) * 4, photometric=CMYK),
    "cmyk-16.tif": tiff(_SPOTS, bits=(16,) * 4, photometric=CMYK),
    "ycbcr.tif": tiff(_LUMA, bits=(8,) * 3, photometric=YCBCR, t530=(1, 1)),
    **{f"grey-{bits}.png": png_of(levels(bits), bits, 0) for bits in (1, 2, 4, 8, 16)},
    "grey-1-see-through.png": png_of(levels(1), 1, 0, chunk(b"tRNS", b"\0\0")),
    "grey-8-see-through.png": png_of(levels(8), 8, 0, chunk(b"tRNS", b"\0\0")),
    "grey-16-see-through.png": png_of(levels(16), 16, 0, chunk(b"tRNS", b"\0\0")),
    "grey-alpha-8.png": png_of(_GREY_ALPHA, 8, 4),
    "grey-alpha-16.png": png_of([value * 257 for value in _GREY_ALPHA], 16, 4),
    "rgb-8.png": png_of(_colours(8), 8, 2),
    "rgb-16.png": png_of(_colours(16), 16, 2),
    "rgb-8-see-through.png": png_of(_colours(8), 8, 2, chunk(b"tRNS", b"\0\xff\0\0\0\0")),
    "rgb-16-see-through.png": png_of(_colours(16), 16, 2, chunk(b"tRNS", b"\xff\xff\0\0\0\0")),
    "rgba-16.png": png_of(_colours_and(16, 0), 16, 6),
    "palette-2.png": png_of([0, 1, 2, 3], 2, 3, _PLTE),
    "palette-see-through.png": png_of(
        [0, 1, 2, 3], 2, 3, _PLTE, chunk(b"tRNS", b"\0\xff")
    ),
}  # fmt: skip
_BMP = encoded("BMP")
_BMP[28:30] = b"\2\0"
# Refused: Pillow reads their numbers, and nothing says which one is white; or Pillow has no such layout.
REFUSED = {
    "two-bits.bmp": (bytes(_BMP), "Unsupported BMP pixel depth"),
    "float.tif": (tiff(np.float32(LEVELS).tobytes(), bits=(32,), t339=3), "no defined white"),
    "white-is-zero-float.tif": (
        tiff(np.float32(LEVELS).tobytes(), bits=(32,), photometric=0, t339=(3,)), "no defined white"
    ),
    "signed-8.tif": (tiff(levels(8), t339=2), "no defined white"),
    "signed-16.tif": (tiff(np.int16([-9, 0, 9, 99]).tobytes(), bits=(16,), t339=2), "no defined white"),
    "signed-32.tif": (tiff(np.int32([-9, 0, 9, 99]).tobytes(), bits=(32,), t339=2), "no defined white"),
    "cielab.tif": (tiff([50, 0, 0] * 4, bits=(8,) * 3, photometric=CIELAB), "CIELAB"),
    "inks.tif": (tiff([0, 9, 9, 0] * 4, bits=(8,) * 4, photometric=CMYK, t332=2), "other inks"),
    "white-is-zero-12.tif": (tiff(levels(12), bits=(12,), photometric=0), "depth or layout"),
    "white-is-zero-32.tif": (tiff(levels(32), bits=(32,), photometric=0), "depth or layout"),
    "white-is-zero-16-big.tif": (tiff(levels(16), bits=(16,), photometric=0, big=True), "depth or layout"),
    "grey-32-big.tif": (tiff(levels(32), bits=(32,), big=True), "depth or layout"),
    "grey-10.tif": (tiff(levels(10), bits=(10,)), "depth or layout"),
    "grey-24.tif": (tiff(bytes(12), bits=(24,)), "depth or layout"),
    "grey-alpha-16.tif": (tiff([0, 65535] * 4, bits=(16, 16), t338=2), "depth or layout"),
    "rgb-12.tif": (tiff(_colours(12), bits=(12,) * 3, photometric=RGB), "depth or layout"),
    "rgb-float.tif": (tiff(bytes(48), bits=(32,) * 3, photometric=RGB, t339=(3, 3, 3)), "depth or layout"),
}  # fmt: skip

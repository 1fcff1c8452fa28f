"""Makes pictures that are hard to read correctly, broken pictures, and decompression bombs.

Every readable one shows four fields, red, green, blue and yellow clockwise from the top left, 40 wide and 24 high.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.media.adversarial_media import CORNERS, AdversarialFile, holding

HEIGHT, WIDTH = SHAPE = 24, 40
WHITE, GREY = (255, 255, 255), (76, 150, 29, 226)  # what Pillow makes of the four colours


def fields() -> Image.Image:
    """The picture."""
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    top, left = slice(None, HEIGHT // 2), slice(None, WIDTH // 2)
    bottom, right = slice(HEIGHT // 2, None), slice(WIDTH // 2, None)
    for place, colour in zip(((top, left), (top, right), (bottom, right), (bottom, left)), CORNERS, strict=True):
        pixels[place] = colour
    return Image.fromarray(pixels)


def saved(mode: str = "RGB", **options: Any) -> Callable[[Path], None]:
    """The picture in one of Pillow's modes."""
    return lambda path: fields().convert(mode).save(path, **options)


def oriented(tag: int) -> Callable[[Path], None]:
    """Stored so that this EXIF orientation shows it upright."""
    exif = Image.Exif()
    exif[0x0112] = tag
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[tag]
    picture = fields() if stored is None else fields().transpose(stored)
    return lambda path: picture.save(path, exif=exif, quality=95, subsampling=0, lossless=True)


def animated(path: Path) -> None:
    """The picture, then two of one colour."""
    others = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("black", "white")]
    fields().save(path, save_all=True, append_images=others, lossless=True)


def transparent(path: Path) -> None:
    """The picture, its lower half wholly transparent."""
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[HEIGHT // 2 :] = 0
    picture = fields().convert("RGBA")
    picture.putalpha(Image.fromarray(alpha))
    picture.save(path, lossless=True)


def transparent_palette(path: Path) -> None:
    """A palette one of whose colours, blue, is transparent."""
    picture = fields().quantize(4)
    blue = picture.getpixel((WIDTH - 1, HEIGHT - 1))
    picture.save(path, transparency=blue)


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of any header and chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def sixteen_bits() -> bytes:
    """The picture as a PNG with 16 bits a colour."""
    pixels = (np.asarray(fields()).astype(">u2") * 257).tobytes()
    stride = WIDTH * 6
    rows = b"".join(b"\0" + pixels[row * stride : (row + 1) * stride] for row in range(HEIGHT))
    return png(WIDTH, HEIGHT, chunk(b"IDAT", zlib.compress(rows)), depth=16)


def sixteen_bit_grey(path: Path) -> None:
    """The picture's luminance, 16 bits of it."""
    Image.fromarray(np.asarray(fields().convert("L")).astype(np.uint16) * 257).save(path)


def encoded(suffix: str, mode: str = "RGB", **options: Any) -> bytearray:
    """The picture's bytes."""
    buffer = io.BytesIO()
    fields().convert(mode).save(buffer, suffix, **options)
    return bytearray(buffer.getvalue())


def _patched(data: bytearray, place: int, value: bytes) -> bytes:
    return bytes(data[:place] + value + data[place + len(value) :])


def _says_huge(suffix: str) -> bytes:
    data = encoded(suffix)
    if suffix == "JPEG":
        return _patched(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", 65500, 65500))
    if suffix == "BMP":
        return _patched(data, 18, struct.pack("<ii", 60000, 60000))
    if suffix == "GIF":
        return _patched(data, 6, struct.pack("<HH", 65500, 65500))
    return _patched(encoded("WEBP", lossless=True), 21, struct.pack("<I", (16383 | 16383 << 14)))


def huge_tiff(path: Path) -> None:
    """A TIFF whose tags say 60,000 x 60,000."""
    fields().save(path)
    data = bytearray(path.read_bytes())
    for tag in (256, 257):
        place = data.index(struct.pack("<H", tag))
        data[place + 2 : place + 12] = struct.pack("<HII", 4, 1, 60000)
    path.write_bytes(data)


def multi_page(path: Path) -> None:
    """The picture, then black."""
    fields().save(path, save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))])


def _text_bomb() -> bytes:
    text = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(80 << 20), 1))
    return png(4, 4, text, chunk(b"IDAT", zlib.compress(bytes(52))))


def _grey(levels: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple((level,) * 3 for level in levels)


def _picture(name: str, write: Callable[[Path], Any], outcome: str = "ok", **expected: Any) -> AdversarialFile:
    shape = {"shape": SHAPE} if outcome == "ok" else {}
    return AdversarialFile(name, write, outcome, "image", frames=None, **{**shape, **expected})


_jpeg = {"quality": 95, "subsampling": 0}
READABLE = [
    _picture("rgb.png", saved()),
    _picture("grey.png", saved("L"), corners=_grey(GREY)),
    _picture("palette.png", saved("P")),
    _picture("transparent.png", transparent, corners=(*CORNERS[:2], WHITE, WHITE)),
    _picture("transparent-palette.png", transparent_palette, corners=(*CORNERS[:2], WHITE, CORNERS[3])),
    _picture("one-bit.png", saved("1"), corners=()),
    _picture("16-bit-grey.png", sixteen_bit_grey, corners=_grey(GREY)),
    _picture("16-bit-colour.png", holding(sixteen_bits())),
    _picture("progressive.jpg", saved(progressive=True, **_jpeg), tolerance=12),
    _picture("cmyk.jpg", saved("CMYK", **_jpeg), tolerance=12),
    _picture("grey.jpg", saved("L", **_jpeg), corners=_grey(GREY), tolerance=12),
    *(_picture(f"exif-{tag}.jpg", oriented(tag), tolerance=12) for tag in range(1, 9)),
    _picture("exif-6.png", oriented(6)),
    _picture("exif-8.webp", oriented(8)),
    _picture("animated.gif", animated),
    _picture("animated.png", animated),
    _picture("animated.webp", animated),
    _picture("transparent.webp", transparent, corners=(*CORNERS[:2], WHITE, WHITE)),
    _picture("lossy.webp", saved(quality=95), tolerance=40),
    _picture("plain.bmp", saved()),
    _picture("deflated.tiff", saved(compression="tiff_adobe_deflate")),
    _picture("several-pages.tiff", multi_page),
    _picture("cmyk.tiff", saved("CMYK")),
    _picture("png-named.jpg", holding(bytes(encoded("PNG")))),
    _picture("jpeg-named.png", holding(bytes(encoded("JPEG", **_jpeg))), tolerance=12),
    _picture("one-pixel.png", holding(png(1, 1, chunk(b"IDAT", zlib.compress(b"\0\1\2\3")))), shape=(1, 1), corners=()),
    _picture("thin.png", lambda path: Image.new("RGB", (20_000, 1), "red").save(path), shape=(1, 20_000), corners=()),
]
BROKEN = [
    _picture("zero-bytes.png", holding(b""), "empty_media", says="zero bytes"),
    _picture("signature.png", holding(b"\x89PNG\r\n\x1a\n"), "unsupported_media"),
    _picture("cut.png", holding(bytes(encoded("PNG")[:80])), "corrupt_media"),
    _picture("cut.jpg", holding(bytes(encoded("JPEG")[:-60])), "corrupt_media"),
    _picture("cut.webp", holding(bytes(encoded("WEBP")[:-40])), "corrupt_media"),
    _picture("cut.gif", holding(bytes(encoded("GIF")[:-60])), "corrupt_media"),
    _picture("wrong-checksum.png", holding(_patched(encoded("PNG"), 60, b"\xff\xff")), "corrupt_media"),
    _picture("no-sides.png", holding(png(0, 0, chunk(b"IDAT", b""))), "unsupported_media"),
    _picture("float.tiff", saved("F"), "unsupported_media", says="no defined white"),
    _picture("bomb.png", holding(png(60_000, 60_000, chunk(b"IDAT", zlib.compress(bytes(99))))), "too_large"),
    _picture("text-bomb.png", holding(_text_bomb()), "corrupt_media", says="too large"),
    _picture("says-huge.jpg", holding(_says_huge("JPEG")), "too_large"),
    _picture("says-huge.bmp", holding(_says_huge("BMP")), "too_large"),
    _picture("says-huge.gif", holding(_says_huge("GIF")), "too_large"),
    _picture("says-huge.webp", holding(_says_huge("WEBP")), "too_large"),
    _picture("says-huge.tiff", huge_tiff, "too_large"),
    _picture("above-the-budget.png", saved(), "too_large", media={"max_pixels_per_frame": HEIGHT * WIDTH - 1}),
]

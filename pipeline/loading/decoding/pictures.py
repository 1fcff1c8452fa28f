"""Decodes pictures to uint8 RGB by Pillow: upright, on white, black and white as the file defines them.

Runs in the sandbox child. What Pillow reads without saying what white is (floats, signed numbers, CIELAB) is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ItemError
from pipeline.loading.decoding.media import Frames

if TYPE_CHECKING:
    from pipeline.config.schema import MediaConfig
    from pipeline.records import RowErrorType

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_HEAD_BYTES = 12
_MAGICS = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG", "GIF": b"GIF8", "BMP": b"BM"}
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MIN_ROWS_RATIO = 0.75  # of a picture that is cut short; with fewer it is refused
_ORIENTATION = 0x0112  # in EXIF
# Tags of TIFF, and some of their values.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _INK_SET = 258, 262, 339, 332
_MIN_IS_WHITE, _UNSIGNED, _NOT_CMYK = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Picture:
    """Holds one decoded picture.

    Attributes:
        pixels: uint8 [H, W, 3] RGB.
        partial: what is missing of it; None where nothing is.
    """

    pixels: np.ndarray
    partial: str | None = None


class _CutShortError(ItemError):
    """The file ends before the picture does."""


def load_images(paths: Sequence[str], media: MediaConfig) -> Frames:
    """Decode pictures to RGB, in order: upright, transparency on white, scaled to 8 bits, the first frame only.

    Raises:
        ItemError: ``too_large``, ``empty_media``, ``unsupported_media`` or ``corrupt_media``, naming the picture.
    """
    frames, problems = [], []
    for place, path in enumerate(paths):
        where = f"picture {place + 1} of {len(paths)}: " if len(paths) > 1 else ""
        try:
            picture = load_picture(path, media.max_pixels_per_frame)
        except ItemError as error:
            raise ItemError(error.error_type, f"{where}{error}") from error
        frames.append(picture.pixels)
        problems += [f"{where}{picture.partial}"] if picture.partial else []
    return Frames(frames, (), "pillow", "; ".join(problems) or None)


def is_picture(source: Any) -> bool:
    """Whether it is a picture of Pillow."""
    from PIL import Image

    return isinstance(source, Image.Image)


def rgb_of(image: Any) -> np.ndarray:
    """Return a picture of Pillow as `load_images` returns that of a file: uint8 [H, W, 3] RGB, upright, on white.

    Raises:
        ItemError: ``unsupported_media``: a mode without a defined white.
    """
    image.load()
    return np.array(_upright(_to_rgb(image), image))


def load_image_pages(
    path: str, max_pixels: int, begin: Callable[[int], int]
) -> Generator[Picture | ItemError, None, None]:
    """Yield the pictures of a TIFF in order, or the error of one that cannot be read. Raises as `load_images`.

    Args:
        path: a local file.
        max_pixels: of one picture.
        begin: is told how many there are, and says how many of them to read.
    """
    with _opened(path, max_pixels, ("TIFF",)) as image:
        num_pages = begin(image.n_frames)
    for number in range(num_pages):
        try:
            page = load_picture(path, max_pixels, formats=("TIFF",), number=number)
        except ItemError as error:
            yield error
        else:
            yield page


def load_picture(path: str, max_pixels: int, *, formats: Sequence[str] = IMAGE_FORMATS, number: int = 0) -> Picture:
    """Decode one picture of a file; most of one that is cut short, as viewers show it. Raises as `load_images`."""
    from PIL import ImageFile

    try:
        return Picture(_decode(path, max_pixels, formats, number)[0])
    except _CutShortError as error:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            pixels, rows_ratio = _decode(path, max_pixels, formats, number)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        problem = f"the picture is cut short: about {rows_ratio:.0%} of its rows are there"
        if rows_ratio < _MIN_ROWS_RATIO:
            raise ItemError("corrupt_media", problem) from error
        return Picture(pixels, problem)


def _decode(path: str, max_pixels: int, formats: Sequence[str], number: int) -> tuple[np.ndarray, float]:
    """Return the picture, and the share of its rows that are not of one colour up to the end."""
    with _opened(path, max_pixels, formats) as image:
        if number:
            image.seek(number)
            if image.width * image.height > max_pixels:
                raise ItemError("too_large", _too_many_pixels(max_pixels))
        image.load()
        rgb = _to_rgb(image)
        return np.array(_upright(rgb, image)), _rows_ratio(image, np.asarray(rgb))


def _rows_ratio(image: Any, pixels: np.ndarray) -> float:
    """Return the share of rows up to where a decoder that got no more bytes fills in one colour."""
    if image.info.get("interlace"):
        return 0.0  # its rows come several times
    if image.format == "BMP":
        pixels = pixels[::-1]
    is_filled = (pixels == pixels[-1, -1]).all(axis=(1, 2))[::-1]
    if image.format == "GIF" or is_filled.all():  # a GIF's rows come in any order
        return 1.0 - float(is_filled.mean())
    return 1.0 - int(is_filled.argmin()) / len(is_filled)


@contextmanager
def _opened(path: str, max_pixels: int, formats: Sequence[str]) -> Iterator[Any]:
    """Open a picture; turn every error about it into an `ItemError`."""
    from PIL import Image, UnidentifiedImageError

    with open(path, "rb") as file:
        if not (head := file.read(_HEAD_BYTES)):
            raise ItemError("empty_media", "the file has zero bytes")
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=tuple(formats)) as image:
                yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ItemError("too_large", _too_many_pixels(max_pixels)) from error
    except UnidentifiedImageError as error:
        raise ItemError("unsupported_media", _unidentified(head, formats)) from error
    except (ItemError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever a broken header leads them into
        words = str(error).lower()
        kind = _CutShortError if "truncated" in words else ItemError
        error_type: RowErrorType = "unsupported_media" if words.startswith("unsupported") else "corrupt_media"
        raise kind(error_type, f"the picture cannot be decoded: {error}") from error


def _unidentified(head: bytes, formats: Sequence[str]) -> str:
    name = next((name for name, magic in _MAGICS.items() if head.startswith(magic)), None)
    if head.startswith(_TIFF_MAGICS):
        name = "TIFF"
    if name in formats:
        return f"a damaged {name} file, or one of a depth or layout that is not read; save it with 8 bits a sample"
    return f"not a picture of {', '.join(formats)} (first bytes {head.hex(' ')})"


def _too_many_pixels(most: int) -> str:
    return f"the picture has more than max_pixels_per_frame = {most} pixels"


def _upright(rgb: Any, image: Any) -> Any:
    """Turn a picture as its EXIF says; EXIF that cannot be read turns nothing, since the picture is there."""
    from PIL import Image

    try:
        orientation = image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # EXIF is read by Pillow's TIFF reader, which raises whatever broken tags lead it into
        return rgb
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return rgb.transpose(turns[orientation]) if orientation in turns else rgb


def _to_rgb(image: Any) -> Any:
    """Return the picture in RGB. What its numbers mean is said by the mode, and in a TIFF by its tags."""
    from PIL import Image

    tags = image.tag_v2 if getattr(image, "format", None) == "TIFF" else {}
    sample_formats = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))
    if image.mode == "F" or set(sample_formats) != {_UNSIGNED}:
        raise _no_white("with floats or signed numbers")
    if image.mode == "LAB":
        raise _no_white("in CIELAB")
    if tags.get(_INK_SET) == _NOT_CMYK:
        raise _no_white("of other inks than CMYK")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(_grey(image, tags)).convert("RGB")
    if image.has_transparency_data:
        image = _with_alpha(image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _no_white(what: str) -> ItemError:
    return ItemError("unsupported_media", f"a picture {what} has no defined white; save it with 8 bits a sample")


def _grey(image: Any, tags: Any) -> np.ndarray:
    """Scale grey of 12, 16 or 32 bits to 8: the largest number that the depth holds is white, or black."""
    (bits, *_) = tags.get(_BITS, (16,))
    values = np.asarray(image)
    values = (values.view(np.uint32) if image.mode == "I" else values).astype(np.uint64)
    white = (1 << bits) - 1
    grey = ((np.minimum(values, white) * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _MIN_IS_WHITE:
        grey = 255 - grey
    if (transparent := image.info.get("transparency")) is not None:
        grey[values == transparent] = 255
    return grey


def _with_alpha(image: Any) -> Any:
    """Read a transparent colour of 16 bits a sample, as PNG has it, in the 8 bits that Pillow keeps."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image

"""Draws pixels and patch labels: textured grounds, shapes, boxes and glyphs on a 112 px canvas.

A canvas keeps its labels in step with its pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.toy_model.data.samples import GRID, PATCH_PX, SIZE_PX
from benchmarks.toy_model.data.vocabulary import COLOUR_LABELS, COLOURS, IGNORE, KIND_LABELS, LINKED_WORDS

GLYPH_WIDTH_PX, GLYPH_HEIGHT_PX = 12, 20
FONTS = ("sans", "bold", "bitmap")
_CLEAR, _UNSURE = 0.25, 0.06


class Canvas:
    """A picture in the making, float32 [112, 112, 3], with labels and hints int16 [2, 14, 14] each."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.labels = np.zeros((2, GRID, GRID), np.int16)
        self.hints = np.full((2, GRID, GRID), IGNORE, np.int16)

    def copy(self) -> Canvas:
        """An independent canvas with the same content."""
        copied = Canvas(self.pixels.copy())
        copied.labels, copied.hints = self.labels.copy(), self.hints.copy()
        return copied

    def paint(self, alpha: np.ndarray, box: tuple[int, int], colour: np.ndarray, colour_name: str, kind: str) -> None:
        """Blend a patch of alpha [h, w] whose top left corner is at ``box`` (x, y), and label what it covers."""
        x, y = box
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + alpha.shape[1], SIZE_PX), min(y + alpha.shape[0], SIZE_PX)
        if x1 <= x0 or y1 <= y0:
            return
        seen = alpha[y0 - y : y1 - y, x0 - x : x1 - x]
        region = self.pixels[y0:y1, x0:x1]
        region += (colour - region) * seen[:, :, None]
        self._label(seen, x0, y0, colour_name, kind)

    def _label(self, seen: np.ndarray, x0: int, y0: int, colour_name: str, kind: str) -> None:
        left, top = x0 // PATCH_PX, y0 // PATCH_PX
        right, bottom = -(-(x0 + seen.shape[1]) // PATCH_PX), -(-(y0 + seen.shape[0]) // PATCH_PX)
        full = np.zeros(((bottom - top) * PATCH_PX, (right - left) * PATCH_PX), np.float32)
        full[y0 - top * PATCH_PX :, x0 - left * PATCH_PX :][: seen.shape[0], : seen.shape[1]] = seen
        cover = full.reshape(bottom - top, PATCH_PX, right - left, PATCH_PX).mean((1, 3))
        sure = cover >= min(_CLEAR, float(cover.max()))
        for plane, label in enumerate((COLOUR_LABELS.index(colour_name), KIND_LABELS.index(kind))):
            view = self.labels[plane, top:bottom, left:right]
            view[(cover > _UNSURE) & ~sure] = IGNORE
            view[sure] = label

    def hint(self, colour_name: str, *, word: str | None = None, place: int = IGNORE) -> None:
        """Say of every patch of a colour which word it leads to, or where the thing is that it belongs to."""
        mine = self.labels[0] == COLOUR_LABELS.index(colour_name)
        self.hints[0][mine] = IGNORE if word is None else LINKED_WORDS.index(word)
        self.hints[1][mine] = place

    def finish(self, rng: np.random.Generator, noise: float = 6.0) -> np.ndarray:
        """Add grain and return uint8 pixels."""
        grain = rng.standard_normal((SIZE_PX, SIZE_PX, 1), np.float32) * noise
        return np.clip(self.pixels + grain, 0, 255).astype(np.uint8)


def ground(rng: np.random.Generator, *, low: int = 15, high: int = 210) -> Canvas:
    """A canvas of smooth coloured noise, or, one time in four, of one plain tone."""
    base = rng.uniform(low, high) + rng.uniform(-12, 12, 3)
    pixels = np.empty((SIZE_PX, SIZE_PX, 3), np.float32)
    pixels[:] = base
    if rng.random() < 0.75:
        cells = int(rng.choice([4, 7, 14, 28]))
        coarse = rng.standard_normal((cells, cells, 3), np.float32) * rng.uniform(4, 18)
        pixels += coarse.repeat(SIZE_PX // cells, 0).repeat(SIZE_PX // cells, 1)
    return Canvas(pixels)


def shade(rng: np.random.Generator, colour_name: str) -> np.ndarray:
    """A slightly different tone of a named colour, float32 [3]."""
    return np.clip(np.array(COLOURS[colour_name], np.float32) + rng.uniform(-16, 16, 3), 0, 255).astype(np.float32)


@lru_cache(maxsize=4096)
def _distance(kind: str, radius_px: float, dx: float, dy: float) -> np.ndarray:
    """Signed distance in pixels to a shape's edge, on a box of 2 * ceil(radius) + 3 pixels."""
    half = int(np.ceil(radius_px)) + 1
    axis = np.arange(-half, half + 1, dtype=np.float32)
    u, v = (axis[None, :] - dx) / radius_px, (axis[:, None] - dy) / radius_px
    far, wide, long = np.hypot(u, v), np.abs(u), np.abs(v)
    unit = {
        "circle": lambda: far - 1,
        "dot": lambda: far - 1,
        "square": lambda: np.maximum(wide, long) - 0.86,
        "triangle": lambda: np.maximum(0.88 * wide - 0.48 * v - 0.48, v - 0.75),
        "diamond": lambda: (wide + long) - 1.05,
        "cross": lambda: np.minimum(np.maximum(wide, long * 3), np.maximum(wide * 3, long)) - 1,
        "ring": lambda: np.abs(far - 0.74) - 0.26,
    }[kind]()
    return unit * radius_px


def shape_alpha(kind: str, radius_px: float, x: float, y: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Coverage [h, w] of a shape centred at (x, y), and the corner where its box goes."""
    left, top = int(np.floor(x)), int(np.floor(y))
    dx, dy = round((x - left) * 4) / 4, round((y - top) * 4) / 4
    distance = _distance(kind, round(radius_px * 2) / 2, dx, dy)
    half = distance.shape[0] // 2
    return np.clip(0.5 - distance, 0, 1), (left - half, top - half)


def box_alpha(width_px: int, height_px: int) -> np.ndarray:
    """Full coverage of a box."""
    return np.ones((height_px, width_px), np.float32)


@lru_cache(maxsize=512)
def glyph_alpha(glyph: str, font: str) -> np.ndarray:
    """Coverage [20, 12] of one glyph, centred in its cell."""
    canvas = Image.new("L", (GLYPH_WIDTH_PX, GLYPH_HEIGHT_PX))
    draw = ImageDraw.Draw(canvas)
    if font == "bitmap":
        small = Image.new("L", (6, 11))
        ImageDraw.Draw(small).text((0, 0), glyph, fill=255, font=ImageFont.load_default_imagefont())
        canvas.paste(small.resize((12, 22), Image.Resampling.NEAREST).crop((0, 1, 12, 21)))
    else:
        middle = (GLYPH_WIDTH_PX / 2, GLYPH_HEIGHT_PX / 2)
        face, stroke = ImageFont.load_default(17 if font == "sans" else 16), 1 if font == "bold" else 0
        draw.text(middle, glyph, fill=255, font=face, anchor="mm", stroke_width=stroke)
    return np.asarray(canvas, np.float32) / 255

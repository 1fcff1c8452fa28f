"""Draws documents: key-value tables and short text lines, in three fonts, dark on light or light on dark.

Glyphs are 12 x 20 px cells whose corners fall on a 4 px lattice: this model sees 112 px, a page's worth of words
would not fit.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from benchmarks.toy_model.data.drawing import (
    FONTS,
    GLYPH_HEIGHT_PX,
    GLYPH_WIDTH_PX,
    Canvas,
    glyph_alpha,
    ground,
)
from benchmarks.toy_model.data.samples import PATCH_PX, SIZE_PX, Question, Sample
from benchmarks.toy_model.data.vocabulary import (
    DIGITS,
    GLYPHS,
    IGNORE,
    IMAGE_CAPTION_PROMPTS,
    KIND_LABELS,
    LETTERS,
    LINKED_WORDS,
)

_LATTICE_PX = 4

Ink = tuple[np.ndarray, str]  # tone and font


def _write(canvas: Canvas, glyphs: Iterable[tuple[str, str]], start: tuple[int, int], ink: Ink) -> None:
    """A text as pairs of a glyph and the one it leads to; a space is empty, or leads nowhere."""
    (x, y), (tone, font) = start, ink
    for index, (glyph, target) in enumerate(glyphs):
        if glyph != " ":
            corner = (x + index * GLYPH_WIDTH_PX, y)
            canvas.paint(glyph_alpha(glyph, font), corner, tone, "none", glyph)
            _label_cell(canvas, corner, glyph, target)


def _label_cell(canvas: Canvas, corner: tuple[int, int], glyph: str, target: str) -> None:
    """Ink is thin: a patch belongs to the glyph whose cell holds its centre."""
    x, y = corner
    cols = [c for c in range(SIZE_PX // PATCH_PX) if x <= c * PATCH_PX + 3.5 < x + GLYPH_WIDTH_PX]
    rows = [r for r in range(SIZE_PX // PATCH_PX) if y + 2 <= r * PATCH_PX + 3.5 < y + GLYPH_HEIGHT_PX - 2]
    cell = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    canvas.labels[1][cell] = KIND_LABELS.index(glyph)
    canvas.hints[0][cell] = IGNORE if target == " " else LINKED_WORDS.index(target)


def _page(rng: np.random.Generator) -> tuple[Canvas, Ink]:
    light = rng.random() < 0.6
    canvas = ground(rng, low=190, high=240) if light else ground(rng, low=10, high=60)
    ink = rng.uniform(0, 50, 3) if light else rng.uniform(200, 255, 3)
    return canvas, (ink.astype(np.float32), str(rng.choice(FONTS)))


def _start(rng: np.random.Generator, size_px: int, *, margin_px: int = 0) -> int:
    return margin_px + _LATTICE_PX * int(rng.integers((SIZE_PX - 2 * margin_px - size_px) // _LATTICE_PX + 1))


def make_table(rng: np.random.Generator) -> Sample:
    """Two to five rows: a letter, a gap, a number of one or two digits."""
    canvas, ink = _page(rng)
    count = int(rng.integers(2, 6))
    keys = [str(k) for k in rng.permutation(list(LETTERS))[:count]]
    values = [str(v) for v in rng.permutation(100)[:count]]
    gap = int(rng.integers(1, 4))
    pitch = GLYPH_HEIGHT_PX if count == 5 else GLYPH_HEIGHT_PX + 4 * int(rng.integers(2))
    x, y = _start(rng, (3 + gap) * GLYPH_WIDTH_PX), _start(rng, count * pitch)
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        text, leads_to = key + " " * gap + value, value[0] + " " * gap + key * len(value)
        _write(canvas, zip(text, leads_to, strict=True), (x, y + row * pitch), ink)
    questions = [Question("document_value", f"What is the value of {k}?", v) for k, v in zip(keys, values, strict=True)]
    questions += [
        Question("document_key", f"Which key has the value {v}?", k) for k, v in zip(keys, values, strict=True)
    ]
    absent = str(rng.choice([k for k in LETTERS if k not in keys]))
    questions.append(Question("document_exists", f"Is there a key {absent}?", "no"))
    questions.append(Question("document_exists", f"Is there a key {keys[0]}?", "yes"))
    text = f"A table with {count} rows. The first key is {keys[0]}."
    questions.append(Question("caption_document", str(rng.choice(IMAGE_CAPTION_PROMPTS)), text))
    return Sample(
        "image", canvas.finish(rng, 4.0)[None], canvas.labels[None].copy(), tuple(questions), canvas.hints[None]
    )


def make_lines(rng: np.random.Generator) -> Sample:
    """One to three lines of two to five glyphs."""
    canvas, ink = _page(rng)
    count = int(rng.integers(1, 4))
    lines = [
        "".join(rng.choice(list(DIGITS if rng.random() < 0.4 else GLYPHS), int(rng.integers(2, 6))))
        for _ in range(count)
    ]
    pitch = GLYPH_HEIGHT_PX + 4 * int(rng.integers(1, 4))
    x, y = _start(rng, max(map(len, lines)) * GLYPH_WIDTH_PX), _start(rng, count * pitch)
    for row, line in enumerate(lines):
        _write(canvas, zip(line, line[1:] + " ", strict=True), (x, y + row * pitch), ink)
    names = ("first", "second", "third")
    questions = [
        Question("document_line", f"What does the {names[row]} line say?", line) for row, line in enumerate(lines)
    ]
    return Sample(
        "image", canvas.finish(rng, 4.0)[None], canvas.labels[None].copy(), tuple(questions), canvas.hints[None]
    )

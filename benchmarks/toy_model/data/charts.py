"""Draws bar charts: three to six bars of distinct colours and heights over a ticked axis."""

from __future__ import annotations

import numpy as np

from benchmarks.toy_model.data.drawing import Canvas, box_alpha, ground, shade
from benchmarks.toy_model.data.samples import Question, Sample, multiple_choice
from benchmarks.toy_model.data.vocabulary import COLOURS, IMAGE_CAPTION_PROMPTS

_MAX_VALUE = 9


def make_chart(rng: np.random.Generator) -> Sample:
    """A chart and questions about single bars, pairs of bars and all bars."""
    count = int(rng.integers(3, 7))
    colours = [str(c) for c in rng.permutation(list(COLOURS))[:count]]
    values = [int(v) for v in rng.permutation(np.arange(1, _MAX_VALUE + 1))[:count]]
    canvas = ground(rng, low=170, high=235) if rng.random() < 0.5 else ground(rng, low=15, high=70)
    _draw(rng, canvas, colours, values)
    pixels = canvas.finish(rng)
    questions = tuple(_questions(rng, colours, values))
    return Sample("image", pixels[None], canvas.labels[None].copy(), questions, canvas.hints[None])


def _draw(rng: np.random.Generator, canvas: Canvas, colours: list[str], values: list[int]) -> None:
    unit = int(rng.integers(8, 11))
    pitch = int(rng.integers(13, (100 // len(colours)) + 1))
    width = max(9, pitch - int(rng.integers(2, 6)))
    left = int(rng.integers(8, 112 - pitch * len(colours)))
    floor = int(rng.integers(unit * _MAX_VALUE + 6, 110))
    ink = 40.0 if canvas.pixels.mean() > 128 else 210.0
    canvas.pixels[floor - unit * _MAX_VALUE : floor + 2, left - 5 : left - 3] = ink
    canvas.pixels[floor : floor + 2, left - 5 : left + pitch * len(colours)] = ink
    for tick in range(1, _MAX_VALUE + 1):
        y = floor - unit * tick
        canvas.pixels[y, left - 7 : left - 5] = ink
        if tick % 3 == 0:
            canvas.pixels[y, left : left + pitch * len(colours)] *= 0.85
    for index, (colour, value) in enumerate(zip(colours, values, strict=True)):
        box = box_alpha(width, unit * value)
        canvas.paint(box, (left + index * pitch, floor - unit * value), shade(rng, colour), colour, "bar")
        canvas.hint(colour, word=str(value))


def _questions(rng: np.random.Generator, colours: list[str], values: list[int]) -> list[Question]:
    tallest, shortest = colours[int(np.argmax(values))], colours[int(np.argmin(values))]
    highest = Question("chart_extreme", "Which bar is the tallest?", tallest)
    questions = [highest, Question("chart_extreme", "Which bar is the shortest?", shortest)]
    questions += [
        Question("chart_value", f"What is the value of the {colour} bar?", str(value))
        for colour, value in zip(colours, values, strict=True)
    ]
    for _ in range(3):
        first, second = (int(i) for i in rng.permutation(len(colours))[:2])
        answer = "yes" if values[first] > values[second] else "no"
        questions.append(
            Question("chart_compare", f"Is the {colours[first]} bar taller than the {colours[second]} bar?", answer)
        )
    wrong = [str(c) for c in rng.permutation(colours) if c != tallest]
    if len(wrong) >= 3:
        questions.append(multiple_choice(rng, highest, wrong))
    prompt = str(rng.choice(IMAGE_CAPTION_PROMPTS))
    text = f"A bar chart with {len(colours)} bars. The {tallest} bar is the tallest."
    questions.append(Question("caption_chart", prompt, text))
    return questions

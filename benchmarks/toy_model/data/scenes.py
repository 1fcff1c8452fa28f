"""Draws pictures of coloured shapes and small dots on textured grounds, with questions, also about pairs of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.toy_model.data.drawing import Canvas, ground, shade, shape_alpha
from benchmarks.toy_model.data.samples import SIZE_PX, Question, Sample, multiple_choice
from benchmarks.toy_model.data.vocabulary import COLOURS, IMAGE_CAPTION_PROMPTS, PLACES, SHAPES, article

_CELL_PX = SIZE_PX / 3


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its colour, kind and cell of the 3 x 3 places."""

    colour: str
    kind: str
    cell: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


def place_things(rng: np.random.Generator, count: int, *, dots: int = 0) -> list[Thing]:
    """Things of distinct colours in distinct cells, dots last."""
    colours = rng.permutation(list(COLOURS))[: count + dots]
    cells = rng.permutation(len(PLACES))[: count + dots]
    kinds = [*rng.choice(SHAPES, count), *["dot"] * dots]
    return [Thing(str(c), str(k), int(p)) for c, k, p in zip(colours, kinds, cells, strict=True)]


def draw_thing(rng: np.random.Generator, canvas: Canvas, thing: Thing) -> None:
    """Paint a thing near the middle of its cell."""
    row, col = divmod(thing.cell, 3)
    radius = rng.uniform(3.0, 4.5) if thing.kind == "dot" else rng.uniform(8, 14)
    slack = 9.0 if thing.kind == "dot" else 4.0
    x, y = (col + 0.5) * _CELL_PX + rng.uniform(-slack, slack), (row + 0.5) * _CELL_PX + rng.uniform(-slack, slack)
    alpha, corner = shape_alpha(thing.kind, radius, x, y)
    canvas.paint(alpha, corner, shade(rng, thing.colour), thing.colour, thing.kind)


def draw_scene(rng: np.random.Generator, things: list[Thing]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, labels and hints of one picture."""
    canvas = ground(rng)
    for thing in things:
        draw_thing(rng, canvas, thing)
    for thing in things:
        canvas.hint(thing.colour, place=thing.cell)
    return canvas.finish(rng), canvas.labels, canvas.hints


def _pick(rng: np.random.Generator, names: object, *, but: str) -> str:
    return str(rng.choice([name for name in names if name != but]))


def _thing_questions(rng: np.random.Generator, thing: Thing, things: list[Thing]) -> list[Question]:
    task = "small" if thing.kind == "dot" else "scene"
    place = PLACES[thing.cell]
    questions = [
        Question(f"{task}_where", f"Where is the {thing.colour} object?", place),
        Question(f"{task}_colour", f"What color is the object at the {place}?", thing.colour),
        Question(f"{task}_exists", f"Is there a {thing.colour} object?", "yes"),
    ]
    if sum(other.kind == thing.kind for other in things) == 1:
        questions.append(Question(f"{task}_colour", f"What color is the {thing.kind}?", thing.colour))
        questions.append(Question(f"{task}_where", f"Where is the {thing.kind}?", place))
    if thing.kind != "dot":
        questions.append(Question("scene_shape", f"What shape is the {thing.colour} object?", thing.kind))
    colour = questions[1]
    wrong = [str(c) for c in rng.permutation(list(COLOURS)) if c != thing.colour]
    questions.append(multiple_choice(rng, colour, wrong))
    return questions


def _absent_questions(rng: np.random.Generator, things: list[Thing]) -> list[Question]:
    absent = [colour for colour in COLOURS if colour not in {thing.colour for thing in things}]
    colour = str(rng.choice(absent))
    questions = [Question("scene_exists", f"Is there a {colour} object?", "no")]
    if not any(thing.kind == "dot" for thing in things):
        questions.append(Question("small_exists", "Is there a dot?", "no"))
    else:
        questions.append(Question("small_exists", "Is there a dot?", "yes"))
    return questions


def caption(things: list[Thing]) -> str:
    """What the picture shows, in reading order."""
    ordered = sorted(things, key=lambda thing: thing.cell)
    return " ".join(f"{article(thing.name)} at the {PLACES[thing.cell]}." for thing in ordered)


def make_scene(rng: np.random.Generator) -> Sample:
    """One to five shapes, often with one dot; every question type the scene allows."""
    dots = int(rng.random() < 0.6)
    things = place_things(rng, int(rng.choice([1, 2, 3, 4, 5], p=[0.15, 0.3, 0.25, 0.15, 0.15])), dots=dots)
    pixels, labels, hints = draw_scene(rng, things)
    questions = [question for thing in things for question in _thing_questions(rng, thing, things)]
    questions += _absent_questions(rng, things)
    questions.append(Question("scene_count", "How many objects are there?", str(len(things))))
    if len(things) <= 3:
        questions.append(Question("caption_image", str(rng.choice(IMAGE_CAPTION_PROMPTS)), caption(things)))
    return Sample("image", pixels[None], labels[None], tuple(questions), hints[None])


def make_pair(rng: np.random.Generator) -> Sample:
    """Two pictures and questions that need both."""
    things = place_things(rng, int(rng.integers(2, 7)))
    cut = int(rng.integers(1, len(things)))
    halves = things[:cut], things[cut:]
    drawn = [draw_scene(rng, half) for half in halves]
    questions = []
    for name, half in zip(("first", "second"), halves, strict=True):
        thing = half[int(rng.integers(len(half)))]
        other = halves[1] if name == "first" else halves[0]
        questions.append(Question("pair", f"Which image has the {thing.colour} object?", name))
        stranger = other[int(rng.integers(len(other)))]
        shown, answer = (thing, "yes") if rng.random() < 0.5 else (stranger, "no")
        questions.append(Question("pair", f"Is there a {shown.colour} object in the {name} image?", answer))
        if sum(one.kind == thing.kind for one in half) == 1:
            questions.append(Question("pair", f"What color is the {thing.kind} in the {name} image?", thing.colour))
    pixels, labels, hints = (np.stack(part) for part in zip(*drawn, strict=True))
    return Sample("images", pixels, labels, tuple(questions), hints)

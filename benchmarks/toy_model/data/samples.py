"""Defines a generated sample: frames, questions with answers, and a label for every patch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from benchmarks.toy_model.data.vocabulary import IGNORE

SIZE_PX = 112
PATCH_PX = 8
GRID = SIZE_PX // PATCH_PX

InputKind = Literal["image", "images", "video"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one sample.

    Attributes:
        task: what the benchmark reports it under.
        text: as the user puts it.
        answer: the only right answer.
    """

    task: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture, set of pictures or clip, with everything that is true of it.

    Attributes:
        input_kind: how the frames reach the model.
        frames: uint8 [F, 112, 112, 3].
        labels: int16 [F, 2, 14, 14]: colour and kind of each patch (0 background, `vocabulary.IGNORE` unsure).
        questions: in the order they were made.
        hints: int16 [F or 1, 2, 14, 14], what a patch has to do with its surroundings: a word it leads to (index into
            `vocabulary.LINKED_WORDS`) and the place of the thing it belongs to (index into `vocabulary.PLACES`);
            IGNORE where there is none. Training reads them, the benchmark never.
    """

    input_kind: InputKind
    frames: np.ndarray
    labels: np.ndarray
    questions: tuple[Question, ...]
    hints: np.ndarray = field(default_factory=lambda: np.full((1, 2, GRID, GRID), IGNORE, np.int16))


def multiple_choice(rng: np.random.Generator, question: Question, wrong: list[str]) -> Question:
    """The same question with lettered options; the answer becomes a letter."""
    options = [question.answer, *wrong[:3]]
    order = rng.permutation(len(options))
    lettered = " ".join(f"{'ABCD'[place]}. {options[index]}" for place, index in enumerate(order))
    letter = "ABCD"[int(np.flatnonzero(order == 0)[0])]
    return Question(f"{question.task}_choice", f"{question.text} {lettered}", letter)

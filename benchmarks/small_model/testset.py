"""The frozen test set: which samples, and which two questions of each. Fresh seeds, split ``test``."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.small_model.mixture import make
from benchmarks.small_model.samples import Question, Sample

# Samples a kind at full size: 2,000 pictures beside 200 pairs, and 300 clips.
SIZES = {"scene": 900, "chart": 450, "table": 400, "lines": 250, "pair": 200, "motion": 170, "order": 90, "flashes": 40}
CLIP_FRAMES = 8
QUESTIONS_A_SAMPLE = 2

# What a table row is made of. Counting and reading whole lines stand apart: they never enter a headline mean.
HEADLINES = {
    "scene": ("scene_colour", "scene_where", "scene_exists"),
    "small": ("small_colour", "small_where", "small_exists"),
    "chart": ("chart_extreme", "chart_value", "chart_compare"),
    "document": ("document_value", "document_key", "document_exists"),
    "video": ("video_direction", "video_order", "video_what"),
    "pair": ("pair",),
    "easy_vqa": ("easy_vqa",),
    "choice": ("scene_colour_choice", "small_colour_choice", "chart_extreme_choice", "video_direction_choice"),
    "shape": ("scene_shape",),
    "line": ("document_line",),
    "count": ("scene_count", "video_count"),
    "caption": ("caption_image", "caption_chart", "caption_document", "caption_video"),
}


@dataclass(frozen=True, slots=True)
class FrozenItem:
    """One question about one sample.

    Attributes:
        sample_id: items of one sample are resampled together.
        sample: pixels and truth.
        question: what is asked.
    """

    sample_id: str
    sample: Sample
    question: Question


def headline(task: str) -> str:
    """The row a task counts towards."""
    return next(name for name, tasks in HEADLINES.items() if task in tasks)


def choose_questions(sample: Sample, seed: int, count: int) -> list[Question]:
    """Questions of different rows where there are such, drawn by ``seed``."""
    rng = np.random.default_rng([5, seed])
    groups: dict[str, list[Question]] = {}
    for index in rng.permutation(len(sample.questions)):
        question = sample.questions[index]
        groups.setdefault(headline(question.task), []).append(question)
    names = [str(name) for name in rng.permutation(sorted(groups))]
    rounds = [groups[name][turn] for turn in range(count) for name in names if turn < len(groups[name])]
    return rounds[:count]


def frozen_items(*, scale: float = 1.0, first_seed: int = 0) -> Iterator[FrozenItem]:
    """Every question of the test set, or of its first ``scale`` part."""
    for kind, size in SIZES.items():
        for seed in range(first_seed, first_seed + max(1, round(size * scale))):
            sample = make(kind, seed, split="test", num_frames=CLIP_FRAMES)
            salt = zlib.crc32(f"{kind}/{seed}".encode())
            for question in choose_questions(sample, salt, QUESTIONS_A_SAMPLE):
                yield FrozenItem(f"{kind}/{seed}", sample, question)


def easy_vqa_items(*, scale: float = 1.0) -> Iterator[FrozenItem]:
    """Two questions of every picture of easy-VQA's official test split."""
    from benchmarks.small_model.third_party import easy_vqa_sample, num_easy_vqa

    for index in range(max(1, round(num_easy_vqa("test") * scale))):
        sample = easy_vqa_sample(index, "test")
        for question in choose_questions(sample, index, QUESTIONS_A_SAMPLE):
            yield FrozenItem(f"easy_vqa/{index}", sample, question)

"""Defines the frozen test set: its samples, and the questions of each. Nothing is trained on split ``test``.

A test pins its digest. Samples are made on demand, so that a process makes only its own.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks.toy_model.data.mixture import CLIPS, make
from benchmarks.toy_model.data.samples import Question, Sample

# Samples a kind at full size: 2,000 pictures beside 100 pairs, and 300 clips.
SIZES = {
    "scene": 1000,
    "chart": 450,
    "table": 450,
    "lines": 100,
    "pair": 100,
    "motion": 200,
    "order": 80,
    "flashes": 20,
}
THIRD_PARTY = {"easy_vqa": 500, "mnist": 200}  # the first of easy-VQA's official test split
GENERATED_GROUPS = ("pictures", "clips")
CLIP_FRAMES = 8
_QUESTIONS_A_STILL, _QUESTIONS_A_CLIP = 2, 3  # a clip costs the tower eight times as much
DIGEST = "c9f238afe604f3d7"  # of the full set without third-party kinds

# What a table row is made of. Counting and reading whole lines stand apart: they never enter a headline mean.
HEADLINES = {
    "scene": ("scene_colour", "scene_where", "scene_exists"),
    "small": ("small_colour", "small_where", "small_exists"),
    "chart": ("chart_extreme", "chart_value", "chart_compare"),
    "document": ("document_value", "document_key", "document_exists"),
    "direction": ("video_direction",),
    "video": ("video_order", "video_what"),
    "pair": ("pair",),
    "easy_vqa": ("easy_vqa",),
    "mnist_scene": ("mnist_scene",),
    "mnist_digit": ("mnist_digit",),
    "choice": ("scene_colour_choice", "small_colour_choice", "chart_extreme_choice", "video_direction_choice"),
    "shape": ("scene_shape",),
    "line": ("document_line",),
    "count": ("scene_count", "video_count"),
    "caption": ("caption_image", "caption_chart", "caption_document", "caption_video"),
}
# Rows whose mean is the headline: facts that one picture or clip states.
MEAN_ROWS = ("scene", "small", "chart", "document", "direction", "video")

SampleName = tuple[str, int]


@dataclass(frozen=True, slots=True)
class TestSample:
    """One sample and its test questions.

    Attributes:
        sample_id: ``KIND/NUMBER``; questions of one sample are resampled together.
        sample: pixels, labels and answers.
        questions: those that count.
    """

    __test__ = False  # to pytest this is no test

    sample_id: str
    sample: Sample
    questions: tuple[Question, ...]

    @property
    def is_clip(self) -> bool:
        return self.sample.input_kind == "video"

    def digest(self) -> str:
        """Sixteen hex digits of pixels, questions and answers."""
        seen = hashlib.sha256(self.sample.frames.tobytes())
        seen.update(repr([(q.task, q.text, q.answer) for q in self.questions]).encode())
        return seen.hexdigest()[:16]


def headline(task: str) -> str:
    """The row a task counts towards."""
    return next(name for name, tasks in HEADLINES.items() if task in tasks)


def group_of(kind: str) -> str:
    """The group of samples that a kind is answered with: of one input kind; third-party kinds apart."""
    if kind in THIRD_PARTY:
        return kind
    return GENERATED_GROUPS[kind in CLIPS]


def choose_questions(sample: Sample, seed: int) -> tuple[Question, ...]:
    """A question of a headline row where there is one (two for a clip), then one of another row; drawn by ``seed``."""
    rng = np.random.default_rng([5, seed])
    groups: dict[str, list[Question]] = {}
    for index in rng.permutation(len(sample.questions)):
        groups.setdefault(headline(sample.questions[index].task), []).append(sample.questions[index])
    rows = [str(row) for row in rng.permutation(sorted(groups))]
    count = _QUESTIONS_A_CLIP if sample.input_kind == "video" else _QUESTIONS_A_STILL
    first = [row for row in rows if row in MEAN_ROWS][: count - 1]
    order = [*first, *(row for row in rows if row not in first)]
    again = [question for row in order for question in groups[row][1:]]
    return tuple([*(groups[row][0] for row in order), *again][:count])


def sample_names(*, scale: float = 1.0, first_seed: int = 0, third_party: Iterable[str] = ()) -> list[SampleName]:
    """The samples of the set, or of the first ``scale`` part of each kind.

    Args:
        scale: part of the set.
        first_seed: of the generated kinds; other than 0 it is another set, to look at while designing.
        third_party: of `THIRD_PARTY`, those installed here.
    """
    sizes = [(kind, first_seed, size) for kind, size in SIZES.items()]
    sizes += [(kind, 0, THIRD_PARTY[kind]) for kind in third_party]
    return [
        (kind, number) for kind, first, size in sizes for number in range(first, first + max(1, round(size * scale)))
    ]


def load_sample(name: SampleName) -> TestSample:
    """Make one sample of the set; the same on every machine."""
    kind, number = name
    sample_id = f"{kind}/{number}"
    sample = (
        _third_party(kind, number) if kind in THIRD_PARTY else make(kind, number, split="test", num_frames=CLIP_FRAMES)
    )
    return TestSample(sample_id, sample, choose_questions(sample, zlib.crc32(sample_id.encode())))


def set_digest(digest_of: dict[str, str]) -> str:
    """One digest for a set from those of its samples, by id."""
    lines = "".join(f"{sample_id} {digest}\n" for sample_id, digest in sorted(digest_of.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _third_party(kind: str, number: int) -> Sample:
    if kind == "easy_vqa":
        from benchmarks.accuracy.third_party import easy_vqa_sample

        return easy_vqa_sample(number, "test")
    from benchmarks.toy_model.data.mnist_scenes import make_mnist_scene

    return make_mnist_scene(number)

"""Schedules the training batches: kinds, counts and layouts of each step's batch, drawn from (seed, step, process)."""

from __future__ import annotations

import numpy as np

from benchmarks.accuracy.third_party import easy_vqa_sample
from benchmarks.toy_model.data.mixture import CLIPS, make
from benchmarks.toy_model.data.samples import Sample
from benchmarks.toy_model.training.batches import NUM_PATCHES, Batch, QuestionEncoder, assemble

_SEEDS_A_STEP, _SEEDS_A_PROCESS = 256, 32
# A batch is of one kind, so that a cut to few patches is not undone by the fullest picture of another kind.
_DENSE_SHARES = {"scene": 0.5, "chart": 0.15, "table": 0.2, "lines": 0.15}
_SHARES = {
    "scene": 0.27,
    "chart": 0.11,
    "table": 0.3,
    "lines": 0.03,
    "pair": 0.04,
    "easy_vqa": 0.04,
    "motion": 0.17,
    "order": 0.04,
    "flashes": 0.01,
}
_KEEPS, _KEEP_SHARES = [NUM_PATCHES, 112, 72], [0.7, 0.2, 0.1]
_CLIP_KEEPS, _CLIP_KEEP_SHARES = [NUM_PATCHES, 100, 64, 40], [0.3, 0.2, 0.25, 0.25]
_CLIP_FRAMES, _CLIP_FRAME_SHARES = [4, 6, 8, 12, 16, 32], [0.28, 0.15, 0.45, 0.06, 0.04, 0.02]
_CLIP_PATCHES_A_PICTURE = 160
_BASE_SHARES = [0.0, 0.25, 0.5, 0.75, 1.0]
_WHOLE_SHARE = 0.12


class BatchSchedule:
    """Makes batches by step number; the same step always gives the same batch.

    Args:
        encoder: encodes questions.
        seed: of the whole training.
        easy_vqa: whether the third-party pictures are in the mixture.
        size: pictures a batch.
        rank: of this training process.
    """

    def __init__(self, encoder: QuestionEncoder, *, seed: int, easy_vqa: bool, size: int = 16, rank: int = 0) -> None:
        self.encoder, self.seed, self.size, self.rank = encoder, seed, size, rank
        self.shares = {kind: share for kind, share in _SHARES.items() if easy_vqa or kind != "easy_vqa"}

    def dense(self, step: int) -> Batch:
        """Single pictures, whole or in part, for patch classification."""
        rng = np.random.default_rng([self.seed, 1, step, self.rank])
        kind = _draw(rng, _DENSE_SHARES)
        keep = int(rng.choice(_KEEPS, p=_KEEP_SHARES))
        return assemble(rng, self._samples(kind, step, self.size), self.encoder, keep=keep, split=1.0, budget=1)

    def questions(self, step: int) -> Batch:
        """Pictures, pairs, clips or easy-VQA with packed questions."""
        shared, rng = (
            np.random.default_rng([self.seed, 2, step]),
            np.random.default_rng([self.seed, 2, step, self.rank]),
        )
        kind = _draw(shared, self.shares)  # one kind and size for all processes: none waits for a longer batch
        if kind in CLIPS:
            return self._clips(shared, rng, kind, step)
        keep = int(shared.choice(_KEEPS, p=_KEEP_SHARES))
        if kind == "pair":
            return assemble(rng, self._samples(kind, step, self.size // 2), self.encoder, keep=keep)
        if kind == "easy_vqa":
            samples = [easy_vqa_sample(int(rng.integers(1 << 30)), "train") for _ in range(self.size)]
        else:
            samples = self._samples(kind, step, self.size)
        share = None if shared.random() < _WHOLE_SHARE else float(shared.choice(_BASE_SHARES))
        return assemble(rng, samples, self.encoder, keep=keep, split=share)

    def _clips(self, shared: np.random.Generator, rng: np.random.Generator, kind: str, step: int) -> Batch:
        num_frames = int(shared.choice(_CLIP_FRAMES, p=_CLIP_FRAME_SHARES))
        keep = int(shared.choice(_CLIP_KEEPS, p=_CLIP_KEEP_SHARES))
        count = int(np.clip(_CLIP_PATCHES_A_PICTURE * self.size // (num_frames * keep), 1, self.size))
        return assemble(rng, self._samples(kind, step, count, num_frames=num_frames), self.encoder, keep=keep)

    def _samples(self, kind: str, step: int, count: int, *, num_frames: int = 8) -> list[Sample]:
        first = (self.seed << 40) + step * _SEEDS_A_STEP + self.rank * _SEEDS_A_PROCESS
        return [make(kind, first + place, num_frames=num_frames) for place in range(count)]


def _draw(rng: np.random.Generator, shares: dict[str, float]) -> str:
    weight = np.array(list(shares.values()))
    return str(rng.choice(list(shares), p=weight / weight.sum()))

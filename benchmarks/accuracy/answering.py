"""Answers many questions by the tiny demo model: `VLM.generate` itself, with one tower pass a picture.

`SharedEncoding` stands before the family: a medium that several requests name goes through the tower once, and the
blocks before a plan's first step run once for all plans (see `shared_tower.py`). What lies behind it (layout, prompt,
prefill, reductions in the decoder, paged decoding) is the engine's, question by question. `disagreements` asks a sample
of the questions again through an untouched `VLM.generate`. Knows no test set's meaning.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.shared_tower import SharedTiles, SharedTower
from benchmarks.toy_model.data.samples import Question
from benchmarks.toy_model.data.testset import TestSample
from illava import VLM, Preprocessor, Request, SamplingParams
from illava.analysis.agreement import Agreement, measure_agreement
from illava.plan import ReductionPlan
from illava.preprocess import VisualInput
from illava.reduction.probe import AttentionProbe
from illava.visual_tokens import EncodedVisual

CHUNK = 128  # samples whose questions share a running batch: long captions end beside short answers
_CAPTION_TOKENS, _ANSWER_TOKENS = 64, 8
# Few tokens a call stay in a core's cache: sixteen tiles are a quarter faster than 128, prefills of 2,048 tokens faster
# than of 16,384. Chunks as long as a prefill: none is cut in two, which would cost a mask.
_OPTIONS: dict[str, Any] = {
    "max_vision_patches": 16 * 196,
    "max_prefill_tokens": 2048,
    "max_chunk_tokens": 16_384,
    "kv_cache_bytes": 512 << 20,
}


class SharedEncoding:
    """A family that remembers what the tower made of each medium of the current chunk.

    A medium's random draws are those of the first request that names it.
    """

    def __init__(self, family: Any) -> None:
        self._family = family
        self._known: dict[Hashable, tuple[Any, EncodedVisual]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def forget(self) -> None:
        """Begin a chunk: nothing encoded under another plan may be taken for this one."""
        self._known.clear()

    def encode(
        self,
        media: Sequence[Any],
        plan: ReductionPlan,
        *,
        trace: bool,
        seeds: Sequence[int] | None = None,
        probe: AttentionProbe | None = None,
    ) -> list[EncodedVisual]:
        """See `Family.encode`."""
        keys = [(id(mm_item.tiles), id(mm_item.representative), mm_item.kind) for mm_item in media]
        first: dict[Hashable, int] = {}
        for place, key in enumerate(keys):
            if key not in self._known:
                first.setdefault(key, place)
        fresh = [media[place] for place in first.values()]
        own_seeds = None if seeds is None else [seeds[place] for place in first.values()]
        encoded = self._family.encode(fresh, plan, trace=trace, seeds=own_seeds, probe=probe) if fresh else []
        self._known |= zip(first, zip(fresh, encoded, strict=True), strict=True)
        return [self._known[key][1] for key in keys]


@dataclass(frozen=True, slots=True)
class Answers:
    """What a set of samples was answered.

    Attributes:
        texts: per sample, per question.
        num_tokens: per sample, visual tokens of the unreduced model, entering the LLM, in its last layer.
    """

    texts: list[list[str]]
    num_tokens: list[tuple[int, int, int]]


class Answerer:
    """Holds the loaded demo model, and answers sample by sample.

    Args:
        model: a Hugging Face folder.
    """

    def __init__(self, model: str) -> None:
        from illava import load_preprocessor

        self.preprocessor: Preprocessor = load_preprocessor(model)
        self.plain = VLM.from_pretrained(model, dtype="float32", device="cpu", **_OPTIONS)
        family: Any = copy.copy(self.plain.family)
        self.tower = family.tower = SharedTower(family.tower)
        family.encoder = SharedTiles(family, self.tower)
        self._shared = SharedEncoding(family)
        self._unreduced = SharedEncoding(self.plain.family)
        self._media_of: dict[str, tuple[VisualInput, ...]] = {}
        self._vlm, self._whole = (
            VLM(encoding, max_batch_requests=4 * CHUNK, **_OPTIONS)  # type: ignore[arg-type]
            for encoding in (self._shared, self._unreduced)
        )

    def forget(self) -> None:
        """Drop what is kept from plan to plan: prepared media, and what the tower's first blocks made of them."""
        self.tower.forget()
        self._unreduced.forget()
        self._media_of.clear()

    def answer(self, samples: Sequence[TestSample], plan: ReductionPlan) -> Answers:
        """Every question of samples that go through one plan.

        Raises:
            Exception: what ended a request.
        """
        texts, num_tokens = [], []
        for start in range(0, len(samples), CHUNK):
            self._shared.forget()
            chunk = samples[start : start + CHUNK]
            done = iter(self._vlm.generate([r for one in chunk for r in self._requests(one)], plan=plan))
            for one in chunk:
                own = [next(done) for _ in one.questions]
                usage = own[0].usage
                texts.append([generation.text.strip() for generation in own])
                num_tokens.append(
                    (usage.num_vision_tokens, usage.num_vision_tokens_kept, usage.num_decoder_tokens_kept)
                )
        return Answers(texts, num_tokens)

    def disagreements(self, samples: Sequence[TestSample], texts: Sequence[str], plan: ReductionPlan) -> int:
        """First questions that a plain `VLM.generate` answers in other words.

        Args:
            samples: the first question of each is answered; a picture's tower pass had its random draws.
            texts: what `answer` said to it.
            plan: the same.
        """
        requests = [next(iter(self._requests(sample))) for sample in samples]
        found = self.plain.generate(requests, plan=plan)
        return sum(one.text.strip() != text for one, text in zip(found, texts, strict=True))

    def agreement(self, samples: Sequence[TestSample], plan: ReductionPlan) -> list[Agreement]:
        """How far every question's answer agrees with the unreduced model's, question by question."""
        found = []
        for start in range(0, len(samples), CHUNK):
            self._shared.forget()
            requests = [request for one in samples[start : start + CHUNK] for request in self._requests(one)]
            found += measure_agreement(self._vlm, requests, plan, reference=self._whole)
        return found

    def _requests(self, one: TestSample) -> list[Request]:
        media = self._media(one)
        return [
            Request(f"{one.sample_id}/{number}", (*media, question.text), _sampling(question))
            for number, question in enumerate(one.questions)
        ]

    def _media(self, one: TestSample) -> tuple[VisualInput, ...]:
        if one.sample_id not in self._media_of:
            frames = one.sample.frames
            made = [self.preprocessor.video(frames)] if one.is_clip else self.preprocessor.images(frames)
            self._media_of[one.sample_id] = tuple(made)
        return self._media_of[one.sample_id]


def _sampling(question: Question) -> SamplingParams:
    limit = _CAPTION_TOKENS if question.task.startswith("caption") else _ANSWER_TOKENS
    return SamplingParams(max_new_tokens=limit)

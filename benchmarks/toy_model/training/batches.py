"""Makes training batches of samples: patches for the tower, placeholders for the decoder, packed questions.

Token layouts are those of Hugging Face's LLaVA-OneVision: a picture is its base tile and the same pixels again as one
anyres tile with a newline per row; of several pictures each is one tile and one newline; a clip is 7 x 7 pooled tokens
a frame and one newline.

Letters: B samples, F frames, K patches a frame, V visual tokens, T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from benchmarks.toy_model.data.samples import GRID, PATCH_PX, Question, Sample
from benchmarks.toy_model.data.vocabulary import COLOUR_LABELS, IGNORE, KEYWORDS, KIND_LABELS

PREFIX = "<|im_start|>user "
NUM_PATCHES = GRID * GRID


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch; every tensor on the host until `to`.

    Attributes:
        pixels: uint8 [B, F, K, 192], patches as (channel, row, col).
        patch: int64 [B, F, K], index of each patch in the 14 x 14 grid.
        label: int64 [B, F, 2, K].
        pooled: whether every four consecutive patches become one token (clips).
        source: int64 [B, V], row of the frames' features, or the last row + 1 for a newline.
        place: int64 [B, F, K], where the object is that a patch belongs to (index into PLACES), -100 elsewhere.
        linked_word: int64 [B, V], the word a visual token leads to (index into LINKED_WORDS), -100 elsewhere.
        slot: int64 [B, V], placeholder of each visual token among ``num_placeholders``.
        ids, block, step: int64 [B, T]: text tokens, their question (-2 = padding), their place within it.
        target: int64 [B, T], the token that follows, -100 where it is not part of an answer.
        keyword_answer: int64 [B, T], the answer's first token at the question's keyword, -100 elsewhere.
        keyword_label: int64 [B, T], the keyword's index in (*COLOUR_LABELS, *KIND_LABELS), -100 for words of place or
            direction.
        tasks: per sample, the questions packed, in block order.
    """

    pixels: Tensor
    patch: Tensor
    label: Tensor
    pooled: bool
    place: Tensor
    source: Tensor
    linked_word: Tensor
    slot: Tensor
    num_placeholders: int
    ids: Tensor
    block: Tensor
    step: Tensor
    target: Tensor
    keyword_answer: Tensor
    keyword_label: Tensor
    tasks: tuple[tuple[Question, ...], ...]

    def to(self, device: str) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved = {
            k: v.to(device) for k, v in ((f.name, getattr(self, f.name)) for f in fields(self)) if isinstance(v, Tensor)
        }
        return replace(self, **moved)


def patchify(frames: np.ndarray) -> np.ndarray:
    """Uint8 [F, 112, 112, 3] -> [F, 196, 192] with (channel, row, col) inside a patch, as a convolution reads it."""
    cut = frames.reshape(-1, GRID, PATCH_PX, GRID, PATCH_PX, 3).transpose(0, 1, 3, 5, 2, 4)
    return cut.reshape(frames.shape[0], NUM_PATCHES, 3 * PATCH_PX * PATCH_PX)


def choose_patches(rng: np.random.Generator, labels: np.ndarray, keep: int, *, grouped: bool) -> np.ndarray:
    """Foreground first, then random background: int64 [F, keep], ascending; whole 2 x 2 groups where ``grouped``.

    Dropping only background keeps every answer true while token counts vary from the first step on.
    """
    num_frames = labels.shape[0]
    if keep == NUM_PATCHES and not grouped:
        return np.broadcast_to(np.arange(NUM_PATCHES), (num_frames, NUM_PATCHES))
    shown = (labels != 0).any(1)
    if grouped:
        half = GRID // 2
        shown = shown.reshape(num_frames, half, 2, half, 2).any((2, 4))
    shown = shown.reshape(num_frames, -1)
    count = keep // 4 if grouped else keep
    rank = shown + rng.random(shown.shape)
    chosen = np.sort(np.argpartition(-rank, count - 1, axis=1)[:, :count], axis=1)
    if not grouped:
        return chosen
    half = GRID // 2
    corner = (chosen // half) * 2 * GRID + (chosen % half) * 2
    return (corner[:, :, None] + np.array([0, 1, GRID, GRID + 1])).reshape(num_frames, -1)


def num_needed(sample: Sample, *, grouped: bool) -> int:
    """Patches that the fullest frame cannot lose."""
    shown = (sample.labels != 0).any(1)
    if grouped:
        half = GRID // 2
        return 4 * int(shown.reshape(-1, half, 2, half, 2).any((2, 4)).sum((1, 2)).max())
    return int(shown.sum((1, 2)).max())


def image_layout(rng: np.random.Generator, patch: np.ndarray, num_base: int, num_tile: int) -> tuple[np.ndarray, ...]:
    """Placeholders of one picture's base tile and anyres tile, each patch at least once: (source, placeholder)."""
    order = rng.permutation(len(patch))
    base, tile = np.sort(order[:num_base]), np.sort(order[len(order) - num_tile :])
    place = patch[tile]
    newline = np.arange(GRID)
    slot = np.concatenate(
        [
            patch[base],
            NUM_PATCHES + (place // GRID) * (GRID + 1) + place % GRID,
            NUM_PATCHES + newline * (GRID + 1) + GRID,
        ]
    )
    source = np.concatenate([base, tile, np.full(GRID, len(patch))])
    by_slot = np.argsort(slot, kind="stable")
    return source[by_slot], slot[by_slot]


def images_layout(patch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Placeholders of several pictures, one tile and one newline each."""
    num_frames, keep = patch.shape
    newline = num_frames * keep
    source = np.concatenate([np.append(frame * keep + np.arange(keep), newline) for frame in range(num_frames)])
    slot = np.concatenate(
        [frame * (NUM_PATCHES + 1) + np.append(patch[frame], NUM_PATCHES) for frame in range(num_frames)]
    )
    return source, slot


def video_layout(patch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Placeholders of a clip: one a 2 x 2 group, and one newline at the end."""
    num_frames, keep = patch.shape
    half = GRID // 2
    corner = patch[:, ::4]
    slot = np.arange(num_frames)[:, None] * half * half + (corner // GRID // 2) * half + corner % GRID // 2
    source = np.arange(num_frames * keep // 4 + 1)
    return source, np.append(slot.reshape(-1), num_frames * half * half)


def linked_word_labels(linked_word: np.ndarray, source: np.ndarray, *, pooled: bool) -> np.ndarray:
    """The word each visual token leads to, from that of each patch [F, K]: int64 [V]; newlines lead nowhere."""
    word = linked_word.reshape(len(linked_word), -1, 4).max(-1) if pooled else linked_word
    return np.append(word.reshape(-1), IGNORE).astype(np.int64)[source]


class QuestionEncoder:
    """Questions to token blocks in the chat format, with the tokenizer's own ids."""

    def __init__(self, tokenizer: object) -> None:
        self._encode = lru_cache(maxsize=65536)(lambda text: tuple(tokenizer(text).input_ids))
        labels = {word: label for label, word in enumerate((*COLOUR_LABELS, *KIND_LABELS)) if word != "none"}
        self._keywords = {self._encode(f"What {word}")[-1]: labels.get(word, IGNORE) for word in KEYWORDS}
        self.prefix = self._encode(PREFIX)

    def block(self, question: Question) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(prompt ids, answer ids with the end token)."""
        prompt = self._encode(f"\n{question.text}<|im_end|><|im_start|>assistant\n")
        return prompt, self._encode(f"{question.answer}<|im_end|>")

    def pack(
        self, rng: np.random.Generator, questions: tuple[Question, ...], budget: int
    ) -> tuple[list[Question], list[np.ndarray]]:
        """Random questions, one of each task before a second one, up to ``budget`` tokens: (questions, columns)."""
        order = [questions[i] for i in rng.permutation(len(questions))]
        seen: dict[str, int] = {}
        ranked = []
        for question in order:
            seen[question.task] = seen.get(question.task, 0) + 1
            ranked.append((seen[question.task], question))
        chosen, columns, used = [], [], 0
        for _, question in sorted(ranked, key=lambda pair: pair[0]):
            prompt, answer = self.block(question)
            ids = np.array(prompt + answer)
            if chosen and used + len(ids) > budget:
                continue
            target = np.full(len(ids), IGNORE)
            target[len(prompt) - 1 : -1] = answer
            block = np.full(len(ids), len(chosen))
            keyword = self._keyword_columns(question, prompt, answer)
            columns.append(np.stack([ids, block, np.arange(len(ids)), target, *keyword]))
            chosen.append(question)
            used += len(ids)
        return chosen, columns

    def _keyword_columns(self, question: Question, prompt: tuple[int, ...], answer: tuple[int, ...]) -> np.ndarray:
        """At an open question's last keyword the answer's first token and the keyword's label: [2, len of both]."""
        columns = np.full((2, len(prompt + answer)), IGNORE)
        found = [index for index, token in enumerate(prompt) if token in self._keywords]
        if found and question.text.endswith("?"):  # not of options, which come behind the question mark
            columns[:, found[-1]] = answer[0], self._keywords[prompt[found[-1]]]
        return columns


def assemble(
    rng: np.random.Generator,
    samples: list[Sample],
    encoder: QuestionEncoder,
    *,
    keep: int = NUM_PATCHES,
    split: float | None = None,
    budget: int = 150,
) -> Batch:
    """One batch of samples of one input kind and frame count.

    Args:
        rng: draws patches, placeholders and questions.
        samples: all of one input kind.
        encoder: encodes questions.
        keep: patches a frame; raised to what the fullest frame needs.
        split: None shows both copies of a picture whole; a share in [0, 1] shows that share of the patches in the
            base tile and the rest in the anyres tile.
        budget: text tokens a sample.
    """
    input_kind = samples[0].input_kind
    grouped = input_kind == "video"
    keep = max(keep, *(num_needed(sample, grouped=grouped) for sample in samples), 4)
    num_base, num_tile = (keep, keep) if split is None else (round(keep * split), keep - round(keep * split))
    rows = []
    for sample in samples:
        patch = choose_patches(rng, sample.labels, keep, grouped=grouped)
        pixels = np.take_along_axis(patchify(sample.frames), patch[:, :, None], 1)
        labels = sample.labels.reshape(len(patch), 2, NUM_PATCHES)
        label = np.take_along_axis(labels, np.broadcast_to(patch[:, None], (len(patch), 2, keep)), 2)
        if input_kind == "image":
            layout = image_layout(rng, patch[0], num_base, num_tile)
        else:
            layout = video_layout(patch) if grouped else images_layout(patch)
        hints = np.broadcast_to(sample.hints, sample.labels.shape).reshape(len(patch), 2, NUM_PATCHES)
        linked_word, place = (np.take_along_axis(hints[:, plane], patch, 1) for plane in (0, 1))
        rows.append((pixels, patch, label, *layout, linked_word_labels(linked_word, layout[0], pooled=grouped), place))
    packed = [encoder.pack(rng, sample.questions, budget) for sample in samples]
    frames = len(samples[0].frames)
    num_of = {"image": NUM_PATCHES * 2 + GRID, "images": frames * (NUM_PATCHES + 1)}
    stacked = [torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)]
    ids, block, step, target, keyword_answer, keyword_label = _pad_text(
        [np.concatenate(columns, 1) for _, columns in packed]
    )
    return Batch(
        pixels=stacked[0],
        patch=stacked[1].long(),
        label=stacked[2].long(),
        pooled=grouped,
        source=stacked[3].long(),
        slot=stacked[4].long(),
        linked_word=stacked[5].long(),
        place=stacked[6].long(),
        num_placeholders=num_of.get(input_kind, frames * (GRID // 2) ** 2 + 1),
        ids=ids,
        block=block,
        step=step,
        target=target,
        keyword_answer=keyword_answer,
        keyword_label=keyword_label,
        tasks=tuple(tuple(chosen) for chosen, _ in packed),
    )


def _pad_text(columns: list[np.ndarray]) -> list[Tensor]:
    width = -(-max(part.shape[1] for part in columns) // 16) * 16
    table = np.zeros((6, len(columns), width), np.int64)
    table[1], table[3:] = -2, IGNORE
    for row, part in enumerate(columns):
        table[:, row, : part.shape[1]] = part
    return [torch.from_numpy(plane) for plane in table]

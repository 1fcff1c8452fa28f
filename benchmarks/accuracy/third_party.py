"""Reads easy-VQA (PyPI ``easy-vqa``, MIT, by Victor Zhou): third-party pictures and questions, official split.

Install it beside the project (``pip install easy-vqa``); nothing of it is vendored.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from benchmarks.toy_model.data.samples import GRID, PATCH_PX, SIZE_PX, Question, Sample
from benchmarks.toy_model.data.vocabulary import IGNORE


@lru_cache(maxsize=2)
def _split(split: str) -> tuple[dict[int, str], dict[int, tuple[Question, ...]]]:
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        message = (
            "easy-VQA is not installed; run `pip install easy-vqa`, or leave it out: of accuracy.py's --third-party, "
            "or of train.py by --no-easy-vqa"
        )
        raise SystemExit(message) from error
    is_test = split == "test"
    paths = easy_vqa.get_test_image_paths() if is_test else easy_vqa.get_train_image_paths()
    texts, answers, image_ids = easy_vqa.get_test_questions() if is_test else easy_vqa.get_train_questions()
    questions_of: dict[int, list[Question]] = {}
    for text, answer, image_id in zip(texts, answers, image_ids, strict=True):
        questions_of.setdefault(image_id, []).append(Question("easy_vqa", text, answer))
    return paths, {image_id: tuple(questions) for image_id, questions in questions_of.items()}


def num_easy_vqa(split: str) -> int:
    """Pictures of a split, ``train`` or ``test``."""
    return len(_split(split)[0])


def easy_vqa_sample(index: int, split: str) -> Sample:
    """One picture with all its questions; only its plain ground is labelled (as background)."""
    paths, questions_of = _split(split)
    image_id = sorted(questions_of)[index % len(questions_of)]
    with Image.open(paths[image_id]) as picture:
        pixels = np.asarray(picture.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC))
    away = np.abs(pixels.astype(np.int16) - pixels[0, 0]).max(-1) > 12
    shown = away.reshape(GRID, PATCH_PX, GRID, PATCH_PX).any((1, 3))
    labels = np.where(shown, IGNORE, 0).astype(np.int16)
    return Sample("image", pixels[None].copy(), np.stack([labels, labels])[None], questions_of[image_id])

"""Computes a benchmark's published number from scored rows. Pure functions of scores, categories and ids.

The intervals of `pipeline.evaluation.statistics` belong to the plain mean; what stands here is what papers print.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MMBENCH_ROTATION = 1_000_000  # index of a question's n-th rotation: index + n * this


def category_mean(scores: Sequence[float], categories: Sequence[str]) -> float:
    """Return the mean of the categories' means, whatever their sizes.

    Source: MMStar and MLVU in lmms-eval 0.7.3 ``lmms_eval/tasks/{mmstar,mlvu}/utils.py``.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for score, category in zip(scores, categories, strict=True):
        groups[category].append(score)
    return sum(sum(group) / len(group) for group in groups.values()) / len(groups)


def circular_accuracy(scores: Sequence[float], indexes: Sequence[int]) -> float:
    """Return the share of questions that are right in every rotation of their options.

    Source: MMBench's CircularEval (arXiv 2307.06281, section 4); ids as in lmms-eval 0.7.3
        ``lmms_eval/tasks/mmbench/mmbench_evals.py`` ``eval_result``.
    """
    right: dict[int, bool] = {}
    for score, index in zip(scores, indexes, strict=True):
        question = index % MMBENCH_ROTATION
        right[question] = right.get(question, True) and score == 1.0
    return sum(right.values()) / len(right)


def mme_scores(scores: Sequence[float], categories: Sequence[str], question_ids: Sequence[str]) -> dict[str, float]:
    """MME: for each category accuracy plus accuracy+ (both questions of an image right), 0 to 200.

    Returns:
        Each category's score, and their sums ``perception`` (to 2000) and ``cognition`` (to 800).

    Raises:
        ValueError: an image that has not two questions.

    Source: arXiv 2306.13394, section 2.2; lmms-eval 0.7.3 ``lmms_eval/tasks/mme/utils.py`` ``mme_aggregate_results``.
    """
    images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score, category, question_id in zip(scores, categories, question_ids, strict=True):
        images[category][question_id].append(score)
    result = {}
    for category, pairs in images.items():
        if odd := [name for name, pair in pairs.items() if len(pair) != 2]:
            raise ValueError(f"MME needs two questions an image; {odd[0]!r} in {category} has {len(pairs[odd[0]])}")
        both = sum(sum(pair) == 2 for pair in pairs.values())
        result[category] = 100.0 * (sum(map(sum, pairs.values())) / 2 + both) / len(pairs)
    sums = {
        "perception": sum(score for name, score in result.items() if name in MME_PERCEPTION),
        "cognition": sum(score for name, score in result.items() if name in MME_COGNITION),
    }
    return {**result, **sums}

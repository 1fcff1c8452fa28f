"""Compares two runs over one manifest, item by item: paired differences with intervals, McNemar for scores.

Pairs are items that both runs answered; intervals draw media, not questions. `pipeline.evaluation.comparison_text` says
it in words and in JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import RefusedError
from pipeline.evaluation.run_columns import RunColumns, categories_of, read_run_columns
from pipeline.evaluation.statistics import Interval, McNemar, mcnemar, paired_difference
from pipeline.records import UNANSWERED
from pipeline.runs.run_record import config_diff, recorded_config_fingerprint

MEASURED = (
    "num_vision_tokens_kept",
    "num_decoder_tokens_kept",
    "num_generated_tokens",
    "vision_s",
    "prefill_s",
    "decode_s",
    "latency_s",
    "gpu_s",
    "cost_usd",
)
_SHOWN = ("prompt", "reference", "answer")
_COLUMNS = ("item_id", "uris", "status", "text", "score", "category", "fields", *_SHOWN, *MEASURED)
_RIGHT = 0.5  # a score above it counts as right, as in McNemar's test


@dataclass(frozen=True, slots=True)
class Difference:
    """Holds one quantity in both runs.

    Attributes:
        name: of the column.
        first_mean, second_mean: over the pairs.
        difference: of ``second - first``, paired.
    """

    name: str
    first_mean: float
    second_mean: float
    difference: Interval

    @property
    def ratio(self) -> float | None:
        """``second / first`` of the means; None where the first is zero."""
        return self.second_mean / self.first_mean if self.first_mean else None


@dataclass(frozen=True, slots=True)
class CategoryDifference:
    """Holds the scores of one category in both runs; ``name`` of the difference is the category's.

    Attributes:
        score: of the pairs of this category that have scores.
        only_first, only_second: pairs that only this run has right.
    """

    score: Difference
    only_first: int
    only_second: int


@dataclass(frozen=True, slots=True)
class FlippedItem:
    """Holds an item that one run has right and the other wrong.

    Attributes:
        place: of the item in the manifest, from 0.
        item_id, uris, category, question, reference: of the item.
        scores, answers, texts: of the first and the second run; an answer is what was read in the text, if anything.
    """

    place: int
    item_id: str
    uris: tuple[str, ...]
    category: str
    question: str | None
    reference: str | None
    scores: tuple[float, float]
    answers: tuple[str | None, str | None]
    texts: tuple[str, str]

    @property
    def is_lost(self) -> bool:
        """Whether the first run has it right."""
        return self.scores[0] > _RIGHT


@dataclass(frozen=True, slots=True)
class Comparison:
    """Holds two runs side by side.

    Attributes:
        first_uri, second_uri: of the runs.
        num_items: of the manifest both ran over.
        num_pairs: items both answered; all differences are over these.
        failed_first, failed_second: items that only this run, or both, failed.
        num_erased: items that were erased in one of them, or both.
        num_same_text: pairs whose text is the same to the letter.
        differences: ``score`` first where both runs have scores.
        mcnemar: where all scores are 0 or 1.
        differing_config: key -> (first, second) where the two config fingerprints differ.
        categories: where the items have some and both runs have scores, by name.
        flipped: items that one run has right and the other wrong, in manifest order.
    """

    first_uri: str
    second_uri: str
    num_items: int
    num_pairs: int
    failed_first: int
    failed_second: int
    num_erased: int
    num_same_text: int
    differences: tuple[Difference, ...]
    mcnemar: McNemar | None
    differing_config: dict[str, tuple[Any, Any]]
    categories: tuple[CategoryDifference, ...] = ()
    flipped: tuple[FlippedItem, ...] = ()


def compare_runs(first_uri: str, second_uri: str, *, seed: int = 0) -> Comparison:
    """Compare two finished runs; a run with itself differs by exactly zero.

    Args:
        first_uri: the reference, such as the unreduced run.
        second_uri: what it is compared with.
        seed: of the bootstrap.

    Raises:
        RefusedError: different manifests, or a run that is not finished.
    """
    return compare_columns(read_run_columns(first_uri, _COLUMNS), read_run_columns(second_uri, _COLUMNS), seed=seed)


def compare_columns(first: RunColumns, second: RunColumns, *, seed: int = 0) -> Comparison:
    """Compare as `compare_runs` does, over columns that were read before."""
    _refuse_other_items(first, second)
    statuses = [np.array(run.columns["status"], dtype=str) for run in (first, second)]
    failed = [int((of_run == "failed").sum()) for of_run in statuses]
    erased = [of_run == "erased" for of_run in statuses]
    unanswered = [np.isin(of_run, list(UNANSWERED)) for of_run in statuses]
    pairs = np.flatnonzero(~(unanswered[0] | unanswered[1]))
    if not len(pairs):
        raise RefusedError(f"no item was answered by both {first.uri} and {second.uri}; there is nothing to compare")
    media = np.array(first.media, dtype=object)[pairs]
    _, media = np.unique(media.astype(str), return_inverse=True)
    differences, test = [], None
    categories: tuple[CategoryDifference, ...] = ()
    flipped: tuple[FlippedItem, ...] = ()
    scores = [_floats(run, "score", pairs) for run in (first, second)]
    scored = np.flatnonzero(np.isfinite(scores[0]) & np.isfinite(scores[1]))
    if len(scored):
        a, b = scores[0][scored], scores[1][scored]
        differences.append(_difference("score", a, b, media[scored], seed))
        if np.isin(np.concatenate([a, b]), (0.0, 1.0)).all():
            test = mcnemar(a, b)
        names = np.array(categories_of(first), dtype=str)
        categories = _by_category(names[pairs[scored]], a, b, media[scored], seed)
        places = pairs[scored][(a > _RIGHT) != (b > _RIGHT)]
        flipped = tuple(_flipped(first, second, int(place), names[place]) for place in places)
    for name in MEASURED:
        measured = [_floats(run, name, pairs) for run in (first, second)]
        known = np.flatnonzero(np.isfinite(measured[0]) & np.isfinite(measured[1]))  # null: of an earlier version
        if len(known):
            a, b = (values[known] for values in measured)
            differences.append(_difference(name, a, b, media[known], seed))
    texts = zip(first.columns["text"], second.columns["text"], strict=True)
    same = np.array([a == b for a, b in texts], dtype=bool)[pairs]
    return Comparison(
        first.uri,
        second.uri,
        len(first),
        len(pairs),
        failed[0],
        failed[1],
        int((erased[0] | erased[1]).sum()),
        int(same.sum()),
        tuple(differences),
        test,
        _differing_config(first, second),
        categories,
        flipped,
    )


def _refuse_other_items(first: RunColumns, second: RunColumns) -> None:
    digests = [run.record["manifest_digest"] for run in (first, second)]
    if digests[0] != digests[1]:
        counts = [run.record.get("num_items") for run in (first, second)]
        raise RefusedError(
            f"{first.uri} and {second.uri} ran over different manifests ({counts[0]} items, digest {digests[0][:12]}; "
            f"{counts[1]} items, digest {digests[1][:12]}); run both over the same input to compare them"
        )
    if first.columns["item_id"] != second.columns["item_id"]:
        raise RefusedError(
            f"rows of {first.uri} and {second.uri} are not of the same items, though their manifests are the same; "
            f"see `illava verify {first.uri}`, and the same for the other"
        )


def _floats(run: RunColumns, name: str, pairs: np.ndarray) -> np.ndarray:
    """A column as numbers, NaN for null."""
    return np.array([np.nan if value is None else value for value in run.columns[name]], dtype=np.float64)[pairs]


def _difference(name: str, first: np.ndarray, second: np.ndarray, media: np.ndarray, seed: int) -> Difference:
    interval = paired_difference(first, second, media, seed=seed)
    return Difference(name, float(first.mean()), float(second.mean()), interval)


def _by_category(
    names: np.ndarray, first: np.ndarray, second: np.ndarray, media: np.ndarray, seed: int
) -> tuple[CategoryDifference, ...]:
    found = []
    for name in sorted(set(names.tolist()) - {""}):
        own = names == name
        a, b = first[own], second[own]
        only = [int(((x > _RIGHT) & ~(y > _RIGHT)).sum()) for x, y in ((a, b), (b, a))]
        found.append(CategoryDifference(_difference(name, a, b, media[own], seed), *only))
    return tuple(found)


def _flipped(first: RunColumns, second: RunColumns, place: int, category: str) -> FlippedItem:
    def of_both(name: str) -> tuple[Any, Any]:
        return first.columns[name][place], second.columns[name][place]

    (question, _), (reference, _) = of_both("prompt"), of_both("reference")
    uris = tuple(first.columns["uris"][place])
    item_id = first.columns["item_id"][place]
    scores, answers, texts = of_both("score"), of_both("answer"), of_both("text")
    return FlippedItem(place, item_id, uris, str(category), question, reference, scores, answers, texts)


def _differing_config(first: RunColumns, second: RunColumns) -> dict[str, tuple[Any, Any]]:
    return config_diff(recorded_config_fingerprint(first.record), recorded_config_fingerprint(second.record))

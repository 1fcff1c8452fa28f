"""Scores a question-answering run: overall, by benchmark and by category, with intervals.

Reads a finished run; single answers were scored when their rows were made (`pipeline.tasks.question`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.benchmarks.registry import BENCHMARKS
from pipeline.evaluation.benchmarks.scores import category_mean, circular_accuracy, mme_scores
from pipeline.evaluation.caption_metrics import bleu, cider
from pipeline.evaluation.run_columns import RunColumns, categories_of, read_run_columns
from pipeline.evaluation.statistics import Interval, mean_interval
from pipeline.storage import storage
from pipeline.tasks.answers import references_of
from pipeline.tasks.question import UNSCORED, metric_of

SCORES_FILE = "scores.json"
_COLUMNS = ("uris", "status", "question_id", "category", "text", "answer", "reference", "score", "fields")


@dataclass(frozen=True, slots=True)
class GroupScore:
    """Holds the scores of some rows.

    Attributes:
        name: ``all``, a category, or benchmark and category.
        interval: of the mean over answered rows that have a score; None where every row that would have one failed.
        num_failed: rows of the group that have none because their item failed.
    """

    name: str
    interval: Interval | None
    num_failed: int

    @property
    def mean_with_failures(self) -> float:
        """The mean with every failed row as zero."""
        if self.interval is None:
            return 0.0
        return self.interval.mean * self.interval.num_values / (self.interval.num_values + self.num_failed)


@dataclass(frozen=True, slots=True)
class RunScores:
    """Holds the scores of a run.

    Attributes:
        groups: ``all`` first, then the categories by name; empty where no row has a score, or would have had it.
        num_rows: of the run.
        num_unread: scored rows in whose text no answer could be read; they count as wrong.
        published: benchmark -> name of its published number -> value, over the rows that have a score.
        unpublished: benchmark -> why it has no such number.
    """

    groups: tuple[GroupScore, ...]
    num_rows: int
    num_unread: int
    published: dict[str, dict[str, float]]
    unpublished: dict[str, str]


def score_run(uri: str, *, seed: int = 0) -> RunScores:
    """Score a finished run.

    Raises:
        RefusedError: no run, or one that is not finished.
    """
    return score_columns(read_run_columns(uri, _COLUMNS), seed=seed)


def score_columns(run: RunColumns, *, seed: int = 0) -> RunScores:
    """Score as `score_run` does, over columns that were read before."""
    columns = run.columns
    scores = np.array([np.nan if score is None else score for score in columns["score"]], dtype=np.float64)
    failed = np.array([status == "failed" for status in columns["status"]], dtype=bool)
    lost = failed & _would_have_score(run)
    benchmarks = [fields.get("benchmark", "") for fields in columns["fields"]]
    categories = categories_of(run)
    media = np.unique(np.array(run.media, dtype=str), return_inverse=True)[1]
    names = np.array(categories, dtype=str)
    masks = [("all", np.ones(len(scores), dtype=bool))]
    masks += [(name, names == name) for name in sorted(set(categories)) if name]
    groups = []
    for name, mask in masks:
        scored = np.flatnonzero(mask & np.isfinite(scores) & ~failed)
        if len(scored) or (mask & lost).any():
            interval = mean_interval(scores[scored], media[scored], seed=seed) if len(scored) else None
            groups.append(GroupScore(name, interval, int((mask & failed).sum())))
    unread = sum(s is not None and a is None for s, a in zip(columns["score"], columns["answer"], strict=True))
    return RunScores(tuple(groups), len(scores), unread, *_published(run, benchmarks, failed))


def write_scores(uri: str, scores: RunScores) -> str | None:
    """Write the scores into the run folder as ``scores.json``, and return its address; None where there are none."""
    found = scores_dict(scores)
    if not found:
        return None
    target = storage.join(storage.folder_uri(uri), SCORES_FILE)
    storage.write_atomic(target, (json.dumps(found, ensure_ascii=False, indent=2) + "\n").encode())
    return target


def scores_dict(scores: RunScores) -> dict[str, dict[str, Any]]:
    """Return metric -> its numbers, plain enough for JSON.

    ``score`` is the mean over answered rows: ``mean``, ``low``, ``high`` (95 % over media), ``num_values``,
    ``num_media``, ``num_failed``, ``mean_with_failures``, ``num_unread``, and ``categories`` with the same of each.
    Where all failed, ``mean``, ``low`` and ``high`` are None.
    A published number, such as ``mme perception``, has ``mean`` alone.
    """
    found: dict[str, dict[str, Any]] = {}
    if scores.groups:
        first, *categories = scores.groups
        of_categories = {group.name: _group_dict(group) for group in categories}
        found["score"] = _group_dict(first) | {"num_unread": scores.num_unread, "categories": of_categories}
    for benchmark, numbers in scores.published.items():
        found |= {f"{benchmark} {name}": {"mean": value} for name, value in numbers.items()}
    return found


def _group_dict(group: GroupScore) -> dict[str, Any]:
    interval = group.interval
    return {
        "mean": interval.mean if interval else None,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "num_values": interval.num_values if interval else 0,
        "num_media": interval.num_clusters if interval else 0,
        "num_failed": group.num_failed,
        "mean_with_failures": group.mean_with_failures,
    }


def render_scores(scores: RunScores) -> str:
    """Render the block printed after a question-answering job."""
    if not scores.groups and not scores.published:
        return "scores: none; no row has a reference that can be scored here"
    lines = ["scores (mean, 95 % interval over media)"]
    for group in scores.groups:
        interval = group.interval
        if interval is None:
            line = f"  {group.name:<32} {'-':>7} {'':<16}  0 questions on 0 media"
        else:
            line = f"  {group.name:<32} {interval.mean:7.4f} [{interval.low:.4f}, {interval.high:.4f}]"
            line += f"  {interval.num_values:,} questions on {interval.num_clusters:,} media"
        if group.num_failed:
            line += f"; {group.num_failed} failed ({group.mean_with_failures:.4f} with them as wrong)"
        lines.append(line)
    if scores.num_unread:
        lines.append(f"  in {scores.num_unread:,} texts no answer could be read; they count as wrong")
    for benchmark, numbers in scores.published.items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        lines.append(f"  {benchmark} as published: {shown}")
    lines += [f"  {benchmark} as published: none, {why}" for benchmark, why in scores.unpublished.items()]
    return "\n".join(lines)


def _would_have_score(run: RunColumns) -> np.ndarray:
    """Whether an answer of each row is scored by itself: it has a reference and a metric for single answers."""
    configured = run.record.get("config", {}).get("task", {}).get("metric", "auto")
    rows = zip(run.columns["reference"], run.columns["fields"], strict=True)
    return np.array(
        [
            bool(references_of(reference)) and metric_of(configured, fields.get("metric"), None) not in UNSCORED
            for reference, fields in rows
        ],
        dtype=bool,
    )


def _published(
    run: RunColumns, benchmarks: Sequence[str], failed: np.ndarray
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Published numbers, and why there is none; benchmarks whose number is the plain mean have neither."""
    numbers, reasons = {}, {}
    for name in sorted(set(benchmarks) & _AGGREGATES.keys()):
        needed = run.columns["reference" if BENCHMARKS[name].aggregate == "caption" else "score"]
        rows = [n for n, other in enumerate(benchmarks) if other == name and not failed[n] and needed[n] is not None]
        columns = {key: [values[n] for n in rows] for key, values in run.columns.items()}
        try:
            numbers[name] = _AGGREGATES[name](columns)
        except (ValueError, ZeroDivisionError) as error:
            reasons[name] = str(error) if rows else "no row has a score"
    return numbers, reasons


def _circular(columns: dict[str, list[Any]]) -> dict[str, float]:
    indexes = [int(fields["source_index"]) for fields in columns["fields"]]
    return {"circular_accuracy": circular_accuracy(columns["score"], indexes)}


def _category_mean(columns: dict[str, list[Any]]) -> dict[str, float]:
    return {"category_mean": category_mean(columns["score"], [name or "" for name in columns["category"]])}


def _mme(columns: dict[str, list[Any]]) -> dict[str, float]:
    sums = mme_scores(columns["score"], [name or "" for name in columns["category"]], columns["question_id"])
    return {name: sums[name] for name in ("perception", "cognition")}


def _caption(columns: dict[str, list[Any]]) -> dict[str, float]:
    captions, references = columns["text"], [references_of(reference) for reference in columns["reference"]]
    return {
        "CIDEr": sum(cider(captions, references)) / len(captions),
        **{f"BLEU-{n}": value for n, value in enumerate(bleu(captions, references), start=1)},
    }


_BY_NAME = {"circular": _circular, "category_mean": _category_mean, "mme": _mme, "caption": _caption}
_AGGREGATES = {name: _BY_NAME[table.aggregate] for name, table in BENCHMARKS.items() if table.aggregate in _BY_NAME}

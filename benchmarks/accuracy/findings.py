"""Compares answers: each plan against no reduction, plan against plan, and what the instrument must show.

Works on the parts that `accuracy.py` keeps; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.accuracy.sweep_plans import patches_kept, plan_named
from benchmarks.toy_model.data.testset import HEADLINES, MEAN_ROWS, headline
from pipeline.evaluation.statistics import mcnemar, mean_interval, paired_difference

Parts = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One plan against the reference on the same questions.

    Attributes:
        num_questions: questions compared.
        accuracy, low, high: the plan's exact match and its 95 % interval.
        difference, difference_low, difference_high: plan minus reference, and its 95 % interval.
        lost: right before, wrong now.
        won: wrong before, right now.
    """

    num_questions: int
    accuracy: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    lost: int
    won: int

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, rounded to four places."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def compare(sample_ids: Sequence[str], reference: Sequence[bool], found: Sequence[bool]) -> Comparison:
    """Compare right-or-wrong answers; questions of one sample are drawn together.

    Args:
        sample_ids: the sample of each question.
        reference: whether the reference answered each question exactly.
        found: the same for the plan.
    """
    mean, change = mean_interval(found, sample_ids), paired_difference(reference, found, sample_ids)
    flips = mcnemar(reference, found)
    return Comparison(
        num_questions=mean.num_values,
        accuracy=mean.mean,
        low=mean.low,
        high=mean.high,
        difference=change.mean,
        difference_low=change.low,
        difference_high=change.high,
        lost=flips.only_first,
        won=flips.only_second,
    )


def summarise(parts: Parts, blocks: Sequence[int]) -> dict[str, Any]:
    """Per plan: tokens kept, CPU seconds, and per row the comparison with ``none``."""
    return {
        plan: {
            "patches_kept": round(patches_kept(plan_named(plan, blocks=blocks)), 4),
            **_kept_ratios(own),
            "cpu_s": round(sum(part["cpu_s"] for part in own), 1),
            "tasks": {row: compare_plans(parts, "none", plan, (row,)).as_dict() for row in rows_of(own)},
            "mean": compare_plans(parts, "none", plan, MEAN_ROWS).as_dict(),
        }
        for plan, own in parts.items()
    }


def findings(parts: Parts) -> dict[str, Any]:
    """Whether the instrument works, from paired comparisons; what was not run is left out."""
    found: dict[str, Any] = {}
    if "least_attended@0.5" in parts:
        control = compare_plans(parts, "none", "least_attended@0.5", MEAN_ROWS)
        found["least attended half"] = {**control.as_dict(), "collapses": control.accuracy < 0.4}
    for guided in ("illava", "attention_pruning"):
        if {"random@0.25", f"{guided}@0.25"} <= set(parts):
            margin = compare_plans(parts, "random@0.25", f"{guided}@0.25", ("small",))
            apart = margin.difference >= 0.1 and margin.difference_low > 0
            found[f"{guided} over random at 25 %, small objects"] = {**margin.as_dict(), "separated": apart}
    for method in ("illava", "random", "attention_pruning", "tome"):
        shares = sorted((plan for plan in parts if plan.startswith(f"{method}@")), key=_share, reverse=True)
        steps = list(zip(["none", *shares], shares, strict=False))
        if len(shares) > 1:
            found[f"{method} sweep"] = _rises(parts, steps)
    return found


def _rises(parts: Parts, steps: list[tuple[str, str]]) -> dict[str, Any]:
    """Steps of a sweep at which fewer tokens answer better, beyond the 95 % interval; none of them = monotone."""
    rises = []
    rows = [row for row in rows_of(parts["none"]) if row in MEAN_ROWS]
    for row in rows:
        for more, fewer in steps:
            change = compare_plans(parts, more, fewer, (row,))
            if change.difference_low > 0:
                rises.append({"row": row, "from": more, "to": fewer, **change.as_dict()})
    return {"comparisons": len(rows) * len(steps), "rises": rises, "monotone": not rises}


def compare_plans(parts: Parts, reference: str, plan: str, rows: Sequence[str]) -> Comparison:
    """Two plans over the questions of these rows.

    Raises:
        ValueError: they were asked different questions.
    """
    before, after = (_rights(parts[name], rows) for name in (reference, plan))
    if list(before) != list(after):
        raise ValueError(f"{reference!r} and {plan!r} were asked different questions")
    ids = [sample_id for sample_id, _, _ in before]
    return compare(ids, list(before.values()), list(after.values()))


def _rights(own: list[dict[str, Any]], rows: Sequence[str]) -> dict[tuple[str, str, int], bool]:
    """Right or wrong by (sample, question, number)."""
    tasks = {task for row in rows for task in HEADLINES[row]}
    return {
        (sample_id, text, number): found == answer
        for part in own
        for number, (sample_id, task, text, answer, found) in enumerate(part["answers"])
        if task in tasks
    }


def right_ratio(parts: Parts, plan: str, rows: Sequence[str]) -> float:
    """Share of these rows' questions that a plan answered exactly."""
    rights = list(_rights(parts[plan], rows).values())
    return sum(rights) / len(rights)


def rows_of(own: list[dict[str, Any]]) -> list[str]:
    """Rows that were asked, in the order of the tables."""
    seen = {headline(task) for part in own for _, task, *_ in part["answers"]}
    return [row for row in HEADLINES if row in seen]


def _kept_ratios(own: list[dict[str, Any]]) -> dict[str, float]:
    """Visual tokens entering the LLM and in its last layer, over those of the unreduced model; clips apart."""
    ratios = {}
    for is_clip, prefix in ((False, ""), (True, "clip_")):
        counts = [row[1:] for part in own for row in part["num_tokens"] if row[0] == is_clip]
        whole, entered, last = (sum(column) for column in zip(*counts, strict=True))
        ratios |= {
            f"{prefix}kept_ratio": round(entered / whole, 4),
            f"{prefix}last_layer_ratio": round(last / whole, 4),
        }
    return ratios


def _share(plan: str) -> float:
    return float(plan.partition("@")[2])

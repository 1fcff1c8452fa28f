"""Puts a reduction plan into a line a step, in the words of its YAML; what is off is left out."""

from __future__ import annotations

from typing import Any

from illava.plan import EMPTY_PLAN, ReductionPlan


def plan_lines(plan: ReductionPlan) -> list[str]:
    """Return a line a step, and one for each further key; "none" for a plan that reduces nothing."""
    lines = []
    for step in plan.steps:
        where = " ".join([step.stage, ", ".join(map(str, step.layers))]).strip()
        values = step.reducer.model_dump(mode="json", exclude={"kind"})
        lines.append(f"{where}: {', '.join([step.reducer.kind, *_pairs(values)])}")
    empty = EMPTY_PLAN.model_dump(mode="json")
    own = plan.model_dump(mode="json", exclude={"steps"})
    lines += _pairs({key: value for key, value in own.items() if value != empty[key]})
    return lines or ["none"]


def _pairs(values: dict[str, Any]) -> list[str]:
    return [f"{key} {_plain(value)}" for key, value in values.items() if value is not None and value is not False]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(_pairs(value))
    return "true" if value is True else str(value)

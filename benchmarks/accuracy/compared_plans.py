"""Lists the plans of configs/compare_methods.yaml by name: every method at equal kept tokens."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from illava.plan import ReductionPlan
from pipeline.sweep.config import RowConfig, expand_row

FILE = Path(__file__).resolve().parents[2] / "configs" / "compare_methods.yaml"
PREFIX = "compare:"


@lru_cache(maxsize=4)
def compared_plans(path: Path = FILE) -> dict[str, tuple[ReductionPlan, ReductionPlan]]:
    """(of pictures, of clips) by name, in the file's order; names begin with ``compare:``.

    Raises:
        ValueError: a row that is no plan, or two of one name.
    """
    found: dict[str, tuple[ReductionPlan, ReductionPlan]] = {}
    for row in _content(path)["rows"]:
        axes = row.get("over", {})
        sides = []
        for side in ("image", "clip"):
            used = {name: values for name, values in axes.items() if f"${name}" in str(row[side])}
            sides.append(_expanded(row["name"], row[side], axes, used))
        for name in sides[0]:
            if PREFIX + name in found:
                raise ValueError(f"{path}: two rows {name!r}")
            found[PREFIX + name] = (sides[0][name], sides[1][name])
    return found


def about(path: Path = FILE) -> list[str]:
    """What is compared, in sentences."""
    return list(_content(path)["about"])


def left_out(path: Path = FILE) -> dict[str, str]:
    """Registered methods that no row has, and why."""
    return dict(_content(path)["left_out"])


def _expanded(
    name: str, plan: dict[str, Any], axes: dict[str, list[Any]], used: dict[str, list[Any]]
) -> dict[str, ReductionPlan]:
    """Plans by name; a side that does not depend on an axis has the same plan for each of its values."""
    if used == axes:
        return {name: plan for name, _, plan in expand_row(RowConfig(name=name, plan=plan, over=axes))}
    if used:
        raise ValueError(f"row {name!r}: a side uses all axes or none")
    (axis,) = axes
    same = ReductionPlan.model_validate(plan)
    return {name.format_map({axis: value}): same for value in axes[axis]}


def _content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))

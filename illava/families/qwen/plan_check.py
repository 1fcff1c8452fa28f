"""Checks whether Qwen's towers of native resolution can carry out a plan. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from illava.errors import PlanError
from illava.families.plan_check import check_native_resolution
from illava.plan import ReductionPlan

# Source: transformers 5.23, Qwen2_5_VLVisionConfig.
_DEFAULT_FULL_BLOCKS = (7, 15, 23, 31)


def check_qwen(plan: ReductionPlan, model_type: str, _geometry: Any, *, num_blocks: int, **_: Any) -> None:
    """See `Family.check_vision`; all blocks of the tower attend over a whole segment."""
    check_native_resolution(plan, model_type, num_blocks=num_blocks)


def check_windowed(
    plan: ReductionPlan,
    model_type: str,
    _geometry: Any,
    *,
    num_blocks: int,
    full_blocks: Sequence[int] | None = None,
) -> None:
    """See `Family.check_vision`.

    Args:
        plan: the plan in question.
        model_type: for messages.
        num_blocks: blocks the tower runs.
        full_blocks: those that attend over a whole segment; the others attend within windows.
    """
    check_native_resolution(plan, model_type, num_blocks=num_blocks)
    full = _DEFAULT_FULL_BLOCKS if full_blocks is None else tuple(full_blocks)
    windowed = [block for block in plan.layers("vision_block") if block not in full]
    if windowed:
        raise PlanError(
            f"the plan reduces in vision blocks {windowed}, which attend within windows in {model_type}; "
            f"`layers` can be chosen among its full-attention blocks: {', '.join(map(str, full))}"
        )

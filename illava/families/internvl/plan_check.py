"""Checks whether InternVL's tower can carry out a plan. Torch-free."""

from __future__ import annotations

from typing import Any

from illava.errors import PlanError
from illava.families.internvl.geometry import TileGroupGeometry
from illava.families.plan_check import check_media, tokens_left
from illava.plan import ReductionPlan


def check_internvl(
    plan: ReductionPlan, model_type: str, geometry: TileGroupGeometry, *, num_blocks: int, **_: Any
) -> None:
    """See `Family.check_vision`: whole groups are reduced, and there is a CLS token to score them by.

    Args:
        plan: the plan in question.
        model_type: for messages.
        geometry: tiles and groups.
        num_blocks: blocks the tower runs.
    """
    check_media(plan, model_type)
    if plan.layout == "released":
        raise PlanError(
            f"layout 'released' re-reads kept tokens as a square pseudo-image, which {model_type} has none of: the "
            "groups of a tile are its tokens as they are. Use layout 'geometric'"
        )
    groups = geometry.groups_per_tile
    left = tokens_left(plan, num_blocks=num_blocks, tokens_per_tile=groups, has_cls=True)
    budget = plan.at("decoder_input")
    if budget is not None and budget.per == "frame" and left is not None and budget.num_kept(left) == left:
        raise PlanError(
            f"{budget.kind!r} at decoder_input would remove nothing: a video frame enters the LLM as {left} tokens; "
            "lower its budget or drop the step"
        )

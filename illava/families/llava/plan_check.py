"""Checks whether the tiled families can carry out a plan: LLaVA-OneVision and LLaVA-NeXT. Torch-free."""

from __future__ import annotations

from typing import Any

from illava.errors import PlanError
from illava.families.llava.geometry import AnyresGeometry
from illava.families.plan_check import check_media, square_side, tokens_left
from illava.plan import ReductionPlan


def check_onevision(
    plan: ReductionPlan, model_type: str, geometry: AnyresGeometry, *, num_blocks: int, **_: Any
) -> None:
    """See `Family.check_vision`.

    Args:
        plan: the plan in question.
        model_type: for messages.
        geometry: tiles and grids.
        num_blocks: blocks the tower runs.
    """
    check_media(plan, model_type)
    patches = geometry.grid**2
    left = tokens_left(plan, num_blocks=num_blocks, tokens_per_tile=patches)
    side = square_side(left, tokens_per_tile=patches) if plan.layout == "released" else geometry.grid
    budget = plan.at("decoder_input")
    if budget is not None and budget.per == "frame":
        of_video = (-(-side // 2)) ** 2
        if all(budget.num_kept(count) == count for count in (of_video, left or patches)):
            raise PlanError(
                f"{budget.kind!r} at decoder_input would remove nothing: a video frame enters the LLM as "
                f"{of_video} tokens, one of several images as {left or patches}; lower its budget or drop the step"
            )


def check_next(plan: ReductionPlan, model_type: str, geometry: AnyresGeometry, *, num_blocks: int, **_: Any) -> None:
    """See `check_onevision`; the tower has a CLS token, and reads images only."""
    check_media(plan, model_type, reads_videos=False)
    patches = geometry.grid**2
    left = tokens_left(plan, num_blocks=num_blocks, tokens_per_tile=patches, has_cls=True, reads_videos=False)
    if plan.layout == "released":
        square_side(left, tokens_per_tile=patches)
    for step in plan.steps:
        if step.stage in ("decoder_input", "decoder_layer") and step.reducer.per == "frame":
            raise PlanError(
                f"{step.reducer.kind!r} at {step.stage} keeps a count per frame, but llava_next has none: the "
                "tiles of an image are read as one; set `per` to medium or prompt and give keep_ratio or num_merged"
            )

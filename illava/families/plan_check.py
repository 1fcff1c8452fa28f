"""Checks whether a tower of given depth and tile size can carry out the vision steps of a plan.

All families share these checks, so they know no model and no reducer by name. Torch-free: a dry run makes them too.
"""

from __future__ import annotations

from math import isqrt

from illava.errors import PlanError
from illava.plan import ReductionPlan
from illava.reducers import Stage
from illava.reduction.evidence import CLS_EVIDENCE, VISION_EVIDENCE


def tokens_left(
    plan: ReductionPlan,
    *,
    num_blocks: int,
    tokens_per_tile: int | None,
    has_cls: bool = False,
    reads_videos: bool = True,
) -> int | None:
    """Count the tokens of one tile after the tower's steps; None where the data decide.

    Args:
        plan: the plan in question.
        num_blocks: blocks the tower runs.
        tokens_per_tile: patches, CLS apart; None where they depend on the picture.
        has_cls: the tower has a CLS token, so its attention is known.
        reads_videos: the model reads videos, whose frames could be merged.

    Raises:
        PlanError: a block the tower does not run, evidence it does not have, or a step that would remove nothing.
    """
    beyond = [block for block in plan.layers("vision_block") if block >= num_blocks]
    if beyond:
        raise PlanError(
            f"the plan reduces in vision blocks {beyond}, but this tower runs blocks 0 to {num_blocks - 1}; "
            "choose `layers` among these"
        )
    left: int | None = tokens_per_tile
    sites: list[tuple[Stage, int | None]] = [("vision_block", block) for block in plan.layers("vision_block")]
    sites.append(("vision_output", None))
    for stage, block in sites:
        reducer = plan.at(stage, block)
        if stage == "vision_output" and plan.unmerge is not None:
            left = tokens_per_tile
        if reducer is None:
            continue
        where = stage if block is None else f"{stage} {block}"
        lacking = reducer.evidence(stage) - (CLS_EVIDENCE if has_cls else VISION_EVIDENCE)[stage]
        if lacking:
            raise PlanError(f"{reducer.kind!r} at {where} needs {', '.join(sorted(lacking))}: not known in this tower")
        if reducer.merges_frames and not reads_videos:
            raise PlanError(f"{reducer.kind!r} at {where} merges a video's frames, but this model reads images only")
        if reducer.merges_frames:
            continue  # fewer frames, each as large as before
        kept = None if left is None else reducer.num_kept(left)
        if left is not None and kept is not None and not 0 < kept < left:
            raise PlanError(
                f"{reducer.kind!r} at {where} would leave {kept} of {left} tokens per tile: its budget does not fit a "
                f"tower of {tokens_per_tile} patches per tile; lower it, name fewer layers, or take another preset"
            )
        left = kept
    return left


def check_media(plan: ReductionPlan, model_type: str, *, reads_videos: bool = True) -> None:
    """Refuse a ``media`` step that could never act, or that leaves gaps where later steps need whole grids.

    Raises:
        PlanError: names the step, and says what would be right.
    """
    reducer = plan.at("media")
    if reducer is None:
        return
    if not reads_videos and "image" not in reducer.media_kinds:
        raise PlanError(f"{reducer.kind!r} at media acts on videos, but {model_type} reads images only")
    if reducer.drops_cells and plan.layout == "released":
        raise PlanError(
            f"{reducer.kind!r} at media drops single patches by what is in the picture, and layout 'released' re-reads "
            "a tile's kept tokens as a square: use layout 'geometric'"
        )
    merging = [step.reducer.kind for step in plan.steps if step.reducer.merges_frames]
    if reducer.drops_cells and merging:
        raise PlanError(
            f"{merging[0]!r} merges frames cell by cell, but {reducer.kind!r} at media leaves other cells in every "
            "frame: leave one of them out"
        )


def check_native_resolution(plan: ReductionPlan, model_type: str, *, num_blocks: int) -> None:
    """Refuse vision steps that a tower of native resolution cannot do.

    Raises:
        PlanError: as `tokens_left` and `check_media`; or the released layout.
    """
    check_media(plan, model_type)
    if plan.layout == "released":
        raise PlanError(
            f"layout 'released' re-reads kept tokens as a square pseudo-image; {model_type} reads pictures of any "
            "shape, whose kept tokens make no square: use layout 'geometric'"
        )
    tokens_left(plan, num_blocks=num_blocks, tokens_per_tile=None)


def square_side(num_tokens: int | None, *, tokens_per_tile: int) -> int:
    """Side of the pseudo-image that the released layout makes of one tile's kept tokens.

    Raises:
        PlanError: the count is no square, or not known beforehand.
    """
    if num_tokens is None:
        raise PlanError(
            "layout 'released' re-reads a tile's kept tokens as a square, so their count must be fixed; this plan's "
            "depends on the picture: use layout 'geometric'"
        )
    side = isqrt(num_tokens)
    if side**2 != num_tokens:
        raise PlanError(
            f"layout 'released' re-reads a tile's kept tokens as a square, but {num_tokens} of {tokens_per_tile} are "
            f"left; {side**2} or {(side + 1) ** 2} would be one: change the budgets, or use layout 'geometric'"
        )
    return side

"""What a plan will leave of an item's tokens, from geometry alone: for `--plan`, before any weight is loaded.

First behind the vision tower, in blocks of known size (tiles in the LLaVA families, whole groups of patches at native
resolution in the Qwen families), then in the decoder. Torch-free. The columns of a result row are measured, never taken
from here; tests hold the two equal. A model's depth and geometry stand in `illava.families.model_shape`. Knows nothing
of prompts, items or storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal

from illava.errors import PlanError
from illava.families.llava.geometry import AnyresGeometry
from illava.families.qwen.geometry import NativeGeometry
from illava.plan import ReductionPlan, Stage
from illava.reducers import Reducer


@dataclass(frozen=True, slots=True)
class MediumShape:
    """One medium of a request.

    Attributes:
        kind: ``image`` or ``video``.
        height, width: px before any resize; of a video they matter at native resolution only.
        num_frames: frames given to the model; 1 for an image.
    """

    kind: Literal["image", "video"]
    height: int
    width: int
    num_frames: int = 1


@dataclass(frozen=True, slots=True)
class Block:
    """Visual tokens whose common count is known.

    Attributes:
        visual: index, None where the tokens are of several media.
        frame: index, -1 for what belongs to no frame (separators, a tiled image), None where the tokens are of
            several frames.
        count: tokens; an upper bound where not ``exact``.
    """

    visual: int | None
    frame: int | None
    count: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class TowerCounts:
    """One request behind tower and layout.

    Attributes:
        num_patches: tokens entering the vision tower.
        num_vision_tokens: visual tokens the unreduced model would give its LLM.
        blocks: what the plan leaves of them.
        exact: False where a count depends on the picture.
    """

    num_patches: int
    num_vision_tokens: int
    blocks: list[Block]
    exact: bool


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Expected counts of one request, or of several added up; named as the row's columns.

    Attributes:
        num_patches: tokens entering the vision tower.
        num_vision_tokens: visual tokens the unreduced model would give its LLM.
        num_vision_tokens_kept: visual tokens entering the LLM.
        num_decoder_tokens_kept: visual tokens in the last decoder layer.
        exact: False where a kept count depends on the picture: then it is an upper bound.
    """

    num_patches: int
    num_vision_tokens: int
    num_vision_tokens_kept: int
    num_decoder_tokens_kept: int
    exact: bool = True

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.num_patches + other.num_patches,
            self.num_vision_tokens + other.num_vision_tokens,
            self.num_vision_tokens_kept + other.num_vision_tokens_kept,
            self.num_decoder_tokens_kept + other.num_decoder_tokens_kept,
            self.exact and other.exact,
        )


def expected_counts(
    geometry: AnyresGeometry | NativeGeometry,
    plan: ReductionPlan,
    media: Sequence[MediumShape],
    *,
    num_vision_blocks: int,
    num_decoder_layers: int,
) -> TokenCounts:
    """Tokens of one request before and after a plan.

    Args:
        geometry: of the model.
        plan: what is reduced.
        media: of the request. One image alone is tiled; of several each is one tile, unless the geometry tiles all.
        num_vision_blocks: blocks of the tower.
        num_decoder_layers: layers of the LLM.

    Raises:
        PlanError: a layer the model does not have, counts the released layout cannot make squares of, or a video for
            a model that reads images only.
    """
    _check_layers(plan, "vision_block", num_vision_blocks)
    _check_layers(plan, "decoder_layer", num_decoder_layers)
    tower = tower_counts(geometry, plan, media)
    exact = tower.exact and plan.epsilon is None and not any(step.stage == "media" for step in plan.steps)
    blocks = _reduce(tower.blocks, plan.at("decoder_input"))
    entering = sum(block.count for block in blocks)
    for layer in plan.layers("decoder_layer"):
        blocks = _reduce(blocks, plan.at("decoder_layer", layer))
    return TokenCounts(
        num_patches=tower.num_patches,
        num_vision_tokens=tower.num_vision_tokens,
        num_vision_tokens_kept=entering,
        num_decoder_tokens_kept=sum(block.count for block in blocks),
        exact=exact and all(block.exact for block in blocks),
    )


def _check_layers(plan: ReductionPlan, stage: Stage, depth: int) -> None:
    beyond = [layer for layer in plan.layers(stage) if layer >= depth]
    if beyond:
        raise PlanError(f"the plan reduces at {stage} {beyond}, but this model has 0 to {depth - 1}")


def _reduce(blocks: list[Block], reducer: Reducer | None) -> list[Block]:
    """Counts after one decoder stage. Where a scope's own count is not known, nothing is taken off: an upper bound."""
    if reducer is None:
        return blocks
    several = len({block.visual for block in blocks}) > 1
    untouched: list[Block] = []
    scopes: dict[tuple[int | None, int | None], list[Block]] = {}
    for block in blocks:
        if reducer.per == "prompt":
            scopes.setdefault((None if several else block.visual, None), []).append(block)
        elif reducer.per == "frame" and block.frame == -1:
            untouched.append(block)
        elif block.visual is None or (reducer.per == "frame" and block.frame is None):
            untouched.append(Block(block.visual, block.frame, block.count, exact=False))
        else:
            scopes.setdefault((block.visual, block.frame if reducer.per == "frame" else None), []).append(block)
    # Neighbouring media may share a span; how many do depends on the prompt.
    sharp = not (reducer.per == "span" and several)
    reduced = [_reduce_scope(key, members, reducer, sharp) for key, members in scopes.items()]
    return reduced + untouched


def _reduce_scope(key: tuple[int | None, int | None], members: list[Block], reducer: Reducer, sharp: bool) -> Block:
    total = sum(block.count for block in members)
    kept = reducer.num_kept(total)
    exact = sharp and kept is not None and all(block.exact for block in members)
    return Block(*key, total if kept is None else kept, exact=exact)


def tower_counts(
    geometry: AnyresGeometry | NativeGeometry, plan: ReductionPlan, media: Sequence[MediumShape]
) -> TowerCounts:
    """Patches, unreduced vision tokens, and what the plan's tower steps leave.

    Raises:
        PlanError: counts the released layout cannot make squares of, or a video for a model that reads images only.
    """
    return _native(geometry, plan, media) if isinstance(geometry, NativeGeometry) else _tiled(geometry, plan, media)


def _native(geometry: NativeGeometry, plan: ReductionPlan, media: Sequence[MediumShape]) -> TowerCounts:
    """Where whole groups are reduced."""
    if plan.layout == "released":
        raise PlanError("the released layout needs square pictures, but this model reads any shape: use geometric")
    grids = [geometry.grid_of(visual.kind, visual.num_frames, visual.height, visual.width) for visual in media]
    left = [_left_of_tile(grid.num_groups // grid.times, plan) for grid in grids]
    blocks = [
        Block(index, time, count, exact)
        for index, (grid, (count, exact)) in enumerate(zip(grids, left, strict=True))
        for time in (_frames_left(plan, grid.times) if media[index].kind == "video" else range(grid.times))
    ]
    num_patches, num_groups = sum(grid.num_patches for grid in grids), sum(grid.num_groups for grid in grids)
    return TowerCounts(num_patches, num_groups, blocks, exact=True)


def _tiled(geometry: AnyresGeometry, plan: ReductionPlan, media: Sequence[MediumShape]) -> TowerCounts:
    """Where tiles are reduced."""
    if not geometry.reads_videos and any(visual.kind == "video" for visual in media):
        raise PlanError("this model reads images only, but the request holds a video; take a model that reads videos")
    tiles = [_num_tiles(geometry, visual, media) for visual in media]
    per_tile, exact = _left_of_tile(geometry.grid**2, plan)
    if plan.layout == "released" and not exact:
        raise PlanError("the released layout needs square counts, but this plan's depend on the picture: use geometric")
    blocks = [
        block
        for index, (visual, num_tiles) in enumerate(zip(media, tiles, strict=True))
        for block in _layout(geometry, plan, visual, index=index, num_tiles=num_tiles, per_tile=per_tile)
    ]
    num_vision_tokens = sum(
        geometry.num_video_tokens(visual.num_frames)
        if visual.kind == "video"
        else geometry.num_image_tokens(visual.height, visual.width, num_tiles=num_tiles)
        for visual, num_tiles in zip(media, tiles, strict=True)
    )
    return TowerCounts(sum(tiles) * geometry.grid**2, num_vision_tokens, blocks, exact)


def _num_tiles(geometry: AnyresGeometry, visual: MediumShape, media: Sequence[MediumShape]) -> int:
    if visual.kind == "video":
        return visual.num_frames
    if sum(other.kind == "image" for other in media) > 1 and not geometry.tiles_every_image:
        return 1
    rows, cols = geometry.tile_grid(visual.height, visual.width)
    return 1 + rows * cols


def _left_of_tile(num_patches: int, plan: ReductionPlan) -> tuple[int, bool]:
    """Tokens of one tile or frame after the tower, and whether the plan fixes them."""
    left, exact = num_patches, True
    for reducer in _tower_reducers(plan):
        if not reducer.joins_frames:
            kept = reducer.num_kept(left)
            left, exact = (left, False) if kept is None else (kept, exact)
    return left, exact


def _frames_left(plan: ReductionPlan, num_frames: int) -> tuple[int, ...]:
    """Which frames of a video still stand after the tower."""
    frames = tuple(range(num_frames))
    for reducer in _tower_reducers(plan):
        frames = tuple(frames[n] for n in reducer.frames_kept(len(frames)))
    return frames


def _tower_reducers(plan: ReductionPlan) -> list[Reducer]:
    """What acts in and behind the tower and is not undone, in order."""
    in_blocks = [] if plan.unmerge else [plan.at("vision_block", block) for block in plan.layers("vision_block")]
    return [reducer for reducer in (*in_blocks, plan.at("vision_output")) if reducer is not None]


def _layout(
    geometry: AnyresGeometry, plan: ReductionPlan, visual: MediumShape, *, index: int, num_tiles: int, per_tile: int
) -> list[Block]:
    """Tokens of one medium behind projector, pooling, unpadding and newlines."""
    side = geometry.grid
    if plan.layout == "released":
        side = isqrt(per_tile)
        if side**2 != per_tile:
            raise PlanError(
                f"the released layout re-reads survivors as a square, but {per_tile} of {geometry.grid**2} tokens are "
                f"left of each tile; {side**2} or {(side + 1) ** 2} would be one. Change the budgets, or use geometric"
            )
    separator = Block(index, -1, 1)
    if visual.kind == "video":
        # Pooling restores the grid in the geometric layout, so every frame is as large as without reduction.
        per_frame = geometry.num_video_tokens(1, side=side) - 1
        return [*(Block(index, frame, per_frame) for frame in _frames_left(plan, visual.num_frames)), separator]
    if num_tiles == 1:
        return [Block(index, 0, per_tile), separator]
    if side**2 == per_tile:
        count = geometry.num_image_tokens(visual.height, visual.width, num_tiles=num_tiles, side=side)
        return [Block(index, -1, count)]
    layout = geometry.image_layout(visual.height, visual.width)
    rows, cols = layout.shape
    whole = layout.resized is None and (rows, cols) == (layout.rows, layout.cols)
    kept_tokens = min((num_tiles - 1) * per_tile, rows * cols)
    return [Block(index, -1, per_tile + kept_tokens + rows, exact=whole)]

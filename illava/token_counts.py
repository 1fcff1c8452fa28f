"""Computes how many tokens a plan will keep, from geometry alone: for dry runs, before any weight is loaded.

The module counts first behind the vision tower (per tile in the LLaVA families, per group of patches at native
resolution in the Qwen families), then in the decoder. Torch-free. A result row's columns are measured, never taken from
here; tests hold the two equal. `illava.families.model_shape` has a model's depth and geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from math import isqrt
from typing import Literal

from illava.errors import PlanError
from illava.families.internvl.geometry import TileGroupGeometry
from illava.families.llava.geometry import AnyresGeometry
from illava.families.qwen.geometry import NativeGeometry
from illava.plan import ReductionPlan, Stage
from illava.reducers import Reducer

_Segment = tuple[tuple[int, ...], int, bool]  # frames, tokens, whether that is no upper bound


@dataclass(frozen=True, slots=True)
class VisualShape:
    """The shape of one visual input.

    Attributes:
        kind: ``image`` or ``video``.
        height, width: px before any resize; for a video they matter at native resolution only.
        num_frames: frames given to the model; 1 for an image.
    """

    kind: Literal["image", "video"]
    height: int
    width: int
    num_frames: int = 1


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """A group of visual tokens whose common count is known.

    Attributes:
        mm_index: index of the visual input; None for tokens of several inputs.
        frame: index of the frame; -1 for tokens of no frame (separators, a tiled image), None for tokens of several
            frames.
        count: tokens; an upper bound where not ``exact``.
    """

    mm_index: int | None
    frame: int | None
    count: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class TowerCounts:
    """Token counts of one request behind tower and layout.

    Attributes:
        num_patches: tokens entering the vision tower.
        num_patches_kept: tokens leaving it.
        num_vision_tokens: visual tokens the unreduced model would give its LLM.
        groups: the tokens that the plan keeps of them.
        exact: False where a count depends on the picture.
    """

    num_patches: int
    num_patches_kept: int
    num_vision_tokens: int
    groups: list[TokenGroup]
    exact: bool


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Expected token counts of one request, or of several added up; named as the row's columns.

    Attributes:
        num_patches: tokens entering the vision tower.
        num_patches_kept: tokens leaving it.
        num_vision_tokens: visual tokens the unreduced model would give its LLM.
        num_vision_tokens_kept: visual tokens entering the LLM.
        num_decoder_tokens_kept: visual tokens in the last decoder layer.
        exact: False where a kept count depends on the picture: then it is an upper bound.
    """

    num_patches: int
    num_patches_kept: int
    num_vision_tokens: int
    num_vision_tokens_kept: int
    num_decoder_tokens_kept: int
    exact: bool = True

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.num_patches + other.num_patches,
            self.num_patches_kept + other.num_patches_kept,
            self.num_vision_tokens + other.num_vision_tokens,
            self.num_vision_tokens_kept + other.num_vision_tokens_kept,
            self.num_decoder_tokens_kept + other.num_decoder_tokens_kept,
            self.exact and other.exact,
        )

    def times(self, count: int) -> TokenCounts:
        """Return the counts of so many equal requests."""
        return TokenCounts(
            self.num_patches * count,
            self.num_patches_kept * count,
            self.num_vision_tokens * count,
            self.num_vision_tokens_kept * count,
            self.num_decoder_tokens_kept * count,
            self.exact,
        )


def expected_counts(
    geometry: AnyresGeometry | NativeGeometry | TileGroupGeometry,
    plan: ReductionPlan,
    media: Sequence[VisualShape],
    *,
    num_vision_blocks: int,
    num_decoder_layers: int,
) -> TokenCounts:
    """Count the tokens of one request before and after a plan.

    Args:
        geometry: the model's geometry.
        plan: the plan.
        media: of the request. One image alone is tiled; of several images each is one tile, unless the geometry tiles
            every image.
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
    groups = _reduce(tower.groups, plan.at("decoder_input"))
    entering = sum(group.count for group in groups)
    for layer in plan.layers("decoder_layer"):
        groups = _reduce(groups, plan.at("decoder_layer", layer))
    return TokenCounts(
        num_patches=tower.num_patches,
        num_patches_kept=tower.num_patches_kept,
        num_vision_tokens=tower.num_vision_tokens,
        num_vision_tokens_kept=entering,
        num_decoder_tokens_kept=sum(group.count for group in groups),
        exact=exact and all(group.exact for group in groups),
    )


def _check_layers(plan: ReductionPlan, stage: Stage, depth: int) -> None:
    beyond = [layer for layer in plan.layers(stage) if layer >= depth]
    if beyond:
        raise PlanError(f"the plan reduces at {stage} {beyond}, but this model has 0 to {depth - 1}")


def _reduce(groups: list[TokenGroup], reducer: Reducer | None) -> list[TokenGroup]:
    """Counts after one decoder step. A scope of unknown count is left as it is: an upper bound."""
    if reducer is None:
        return groups
    several = len({group.mm_index for group in groups}) > 1
    window_of = _windows(groups, reducer.frames_in_window)
    untouched: list[TokenGroup] = []
    scopes: dict[tuple[int | None, int | None], list[TokenGroup]] = {}
    for group in groups:
        by_window = reducer.frames_in_window and (group.mm_index in window_of or group.frame is None)
        by_frame = reducer.per == "frame" or by_window
        if reducer.per == "prompt":
            scopes.setdefault((None if several else group.mm_index, None), []).append(group)
        elif by_frame and group.frame == -1:
            untouched.append(group)
        elif group.mm_index is None or (by_frame and group.frame is None):
            untouched.append(TokenGroup(group.mm_index, group.frame, group.count, exact=False))
        else:
            scope = window_of[group.mm_index][group.frame] if group.mm_index in window_of else group.frame
            scopes.setdefault((group.mm_index, scope if by_frame else None), []).append(group)
    # Neighbouring media may share a span; how many do depends on the prompt.
    sharp = not (reducer.per == "span" and several)
    reduced = [_reduce_scope(mm_index, members, reducer, sharp) for (mm_index, _), members in scopes.items()]
    return reduced + untouched


def _windows(groups: list[TokenGroup], num_frames: int | None) -> dict[int | None, dict[int | None, int]]:
    """The window that each frame of each visual input with frames belongs to; none without windows."""
    frames: dict[int | None, set[int]] = {}
    for group in groups if num_frames else ():
        if group.frame is not None and group.frame >= 0 and group.count:
            frames.setdefault(group.mm_index, set()).add(group.frame)
    return {
        mm_index: {frame: n // (num_frames or 1) for n, frame in enumerate(sorted(own))}
        for mm_index, own in frames.items()
    }


def _reduce_scope(mm_index: int | None, members: list[TokenGroup], reducer: Reducer, sharp: bool) -> TokenGroup:
    total, frames = sum(group.count for group in members), {group.frame for group in members}
    exact = sharp and reducer.num_kept(total) is not None and all(group.exact for group in members)
    frame = members[0].frame if len(frames) == 1 and mm_index is not None else None
    return TokenGroup(mm_index, frame, reducer.most_kept(total), exact=exact)


def tower_counts(
    geometry: AnyresGeometry | NativeGeometry | TileGroupGeometry, plan: ReductionPlan, media: Sequence[VisualShape]
) -> TowerCounts:
    """Count patches, unreduced vision tokens, and the tokens that the plan's tower steps keep.

    Raises:
        PlanError: counts the released layout cannot make squares of, or a video for a model that reads images only.
    """
    return _tiled(geometry, plan, media) if isinstance(geometry, AnyresGeometry) else _grouped(geometry, plan, media)


def _grouped(
    geometry: NativeGeometry | TileGroupGeometry, plan: ReductionPlan, media: Sequence[VisualShape]
) -> TowerCounts:
    """Counts where whole groups of patches are reduced; the tiles of one image are no frames."""
    if plan.layout == "released":
        raise PlanError("the released layout needs square pictures, but this model reads groups: use geometric")
    grids = [geometry.grid_of(mm_item.kind, mm_item.num_frames, mm_item.height, mm_item.width) for mm_item in media]
    groups: list[TokenGroup] = []
    for index, (mm_item, grid) in enumerate(zip(media, grids, strict=True)):
        per_tile = grid.num_groups // grid.times
        if mm_item.kind == "video":
            groups += _left_of_video(index, grid.times, per_tile, plan)
        else:
            count, exact = _left_of_tile(per_tile, plan)
            groups.append(TokenGroup(index, 0 if grid.times == 1 else -1, count * grid.times, exact))
    num_patches, num_groups = sum(grid.num_patches for grid in grids), sum(grid.num_groups for grid in grids)
    num_patches_kept = sum(group.count for group in groups) * geometry.group_side**2
    return TowerCounts(num_patches, num_patches_kept, num_groups, groups, exact=True)


def _tiled(geometry: AnyresGeometry, plan: ReductionPlan, media: Sequence[VisualShape]) -> TowerCounts:
    """Counts in a tiled family, where tiles are reduced."""
    if not geometry.reads_videos and any(mm_item.kind == "video" for mm_item in media):
        raise PlanError("this model reads images only, but the request holds a video; take a model that reads videos")
    tiles = [_num_tiles(geometry, mm_item, media) for mm_item in media]
    per_tile, exact = _left_of_tile(geometry.grid**2, plan)
    if plan.layout == "released" and not exact:
        raise PlanError("the released layout needs square counts, but this plan's depend on the picture: use geometric")
    groups = [
        group
        for index, (mm_item, num_tiles) in enumerate(zip(media, tiles, strict=True))
        for group in _layout(geometry, plan, mm_item, index=index, num_tiles=num_tiles, per_tile=per_tile)
    ]
    num_vision_tokens = sum(
        geometry.num_video_tokens(mm_item.num_frames)
        if mm_item.kind == "video"
        else geometry.num_image_tokens(mm_item.height, mm_item.width, num_tiles=num_tiles)
        for mm_item, num_tiles in zip(media, tiles, strict=True)
    )
    num_left = sum(
        sum(group.count for group in _left_of_video(index, num_tiles, geometry.grid**2, plan))
        if mm_item.kind == "video"
        else num_tiles * per_tile
        for index, (mm_item, num_tiles) in enumerate(zip(media, tiles, strict=True))
    )
    return TowerCounts(sum(tiles) * geometry.grid**2, num_left, num_vision_tokens, groups, exact)


def _num_tiles(geometry: AnyresGeometry, mm_item: VisualShape, media: Sequence[VisualShape]) -> int:
    if mm_item.kind == "video":
        return mm_item.num_frames
    if sum(other.kind == "image" for other in media) > 1 and not geometry.tiles_every_image:
        return 1
    rows, cols = geometry.tile_grid(mm_item.height, mm_item.width)
    return 1 + rows * cols


def _left_of_tile(num_patches: int, plan: ReductionPlan) -> tuple[int, bool]:
    """Tokens of one tile or frame after the tower, and whether the plan fixes them."""
    left, exact = num_patches, True
    for reducer in _tower_reducers(plan):
        if not reducer.merges_frames:
            left, exact = reducer.most_kept(left), exact and reducer.num_kept(left) is not None
    return left, exact


def _left_of_video(index: int, num_frames: int, per_frame: int, plan: ReductionPlan) -> list[TokenGroup]:
    """Tokens of a video after the tower: of each frame, or of each window where a method joins frames."""
    left: list[_Segment] = [((frame,), per_frame, True) for frame in range(num_frames)]
    for reducer in _tower_reducers(plan):
        if reducer.merges_frames:
            left = [left[n] for n in reducer.frames_kept(len(left))]
            continue
        if reducer.frames_in_window is not None:
            left = _joined(left, reducer.frames_in_window)
        left = [
            (frames, reducer.most_kept(count), exact and reducer.num_kept(count) is not None)
            for frames, count, exact in left
        ]
    return [TokenGroup(index, own[0] if len(own) == 1 else None, count, exact) for own, count, exact in left]


def _joined(left: list[_Segment], num_frames: int) -> list[_Segment]:
    """The same after windows of so many frames became one each; see `illava.reduction.segments`."""
    begins = accumulate((len(frames) for frames, *_ in left), initial=0)
    windows = groupby(zip(left, begins, strict=False), key=lambda pair: pair[1] // num_frames)
    members = [[segment for segment, _ in own] for _, own in windows]
    return [
        (
            tuple(frame for frames, *_ in own for frame in frames),
            sum(count for _, count, _ in own),
            all(exact for *_, exact in own),
        )
        for own in members
    ]


def _frames_left(plan: ReductionPlan, num_frames: int) -> tuple[int, ...]:
    """The frames of a video that are kept after the tower."""
    frames = tuple(range(num_frames))
    for reducer in _tower_reducers(plan):
        frames = tuple(frames[n] for n in reducer.frames_kept(len(frames)))
    return frames


def _tower_reducers(plan: ReductionPlan) -> list[Reducer]:
    """The reducers that act in and behind the tower and are not undone, in order."""
    in_blocks = [] if plan.unmerge else [plan.at("vision_block", block) for block in plan.layers("vision_block")]
    return [reducer for reducer in (*in_blocks, plan.at("vision_output")) if reducer is not None]


def _layout(
    geometry: AnyresGeometry, plan: ReductionPlan, mm_item: VisualShape, *, index: int, num_tiles: int, per_tile: int
) -> list[TokenGroup]:
    """Tokens of one visual input behind projector, pooling, unpadding and newlines."""
    side = geometry.grid
    if plan.layout == "released":
        side = isqrt(per_tile)
        if side**2 != per_tile:
            raise PlanError(
                f"the released layout re-reads kept tokens as a square, but {per_tile} of {geometry.grid**2} tokens "
                f"are left of each tile; {side**2} or {(side + 1) ** 2} would be one. Change the budgets, or use "
                "geometric"
            )
    separator = TokenGroup(index, -1, 1)
    if mm_item.kind == "video":
        # Pooling restores the grid in the geometric layout, so every frame is as large as without reduction.
        per_frame = geometry.num_video_tokens(1, side=side) - 1
        return [
            *(TokenGroup(index, frame, per_frame) for frame in _frames_left(plan, mm_item.num_frames)),
            separator,
        ]
    if num_tiles == 1:
        return [TokenGroup(index, 0, per_tile), separator]
    if side**2 == per_tile:
        count = geometry.num_image_tokens(mm_item.height, mm_item.width, num_tiles=num_tiles, side=side)
        return [TokenGroup(index, -1, count)]
    layout = geometry.image_layout(mm_item.height, mm_item.width)
    rows, cols = layout.shape
    whole = layout.resized is None and (rows, cols) == (layout.rows, layout.cols)
    kept_tokens = min((num_tiles - 1) * per_tile, rows * cols)
    return [TokenGroup(index, -1, per_tile + kept_tokens + rows, exact=whole)]

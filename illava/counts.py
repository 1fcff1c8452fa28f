"""What a plan will leave of an item's tokens, from geometry alone: for `--plan`, before any weight is loaded.

Torch-free. The columns of a result row are measured, never taken from here; tests hold the two equal.
The LLaVA and Qwen families. Knows nothing of prompts, items or storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal

from illava.errors import ModelLoadError, PlanError
from illava.families.anyres import AnyresGeometry, load_geometry
from illava.families.native_resolution import NativeGeometry
from illava.model_files import JsonSection, load_model_files
from illava.native_preprocess import NATIVE_MODEL_TYPES, load_native_geometry
from illava.plan import ReductionPlan, Stage
from illava.reducers import Reducer

# Source: transformers 5.23, LlamaConfig and MistralConfig.
_DEFAULT_NUM_LAYERS = {"llama": 32, "mistral": 32}


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
class ModelShape:
    """Depth and geometry of one model.

    Attributes:
        geometry: tiles and grids.
        num_vision_blocks: blocks of the tower up to the feature that is used.
        num_decoder_layers: of the LLM.
    """

    geometry: AnyresGeometry | NativeGeometry
    num_vision_blocks: int
    num_decoder_layers: int


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


@dataclass(frozen=True, slots=True)
class _Block:
    """Visual tokens whose common count is known.

    Attributes:
        medium: index, None where the tokens are of several media.
        frame: index, -1 for what belongs to no frame (separators, a tiled image), None where the tokens are of
            several frames.
        count: tokens; an upper bound where not ``exact``.
    """

    medium: int | None
    frame: int | None
    count: int
    exact: bool = True


def load_model_shape(model_id: str, *, revision: str | None = None) -> ModelShape:
    """Depth and geometry from config.json alone.

    Raises:
        ModelLoadError: a file or key is missing, or the model is of no family that is counted.
    """
    files = load_model_files(model_id, revision=revision)
    if files.model_type in NATIVE_MODEL_TYPES:
        text = files.config.section("text_config") if files.config.get("text_config") else files.config
        depth = files.config.section("vision_config")["depth"]
        return ModelShape(load_native_geometry(files), depth, text["num_hidden_layers"])
    if files.model_type not in ("llava_next", "llava_onevision"):
        raise ModelLoadError(
            f"{model_id!r} is a {files.model_type!r} model; tokens are counted for llava_next, llava_onevision, "
            f"{', '.join(sorted(NATIVE_MODEL_TYPES))}"
        )
    feature = files.config["vision_feature_layer"]
    num_blocks = files.config.section("vision_config")["num_hidden_layers"]
    if not isinstance(feature, int):
        raise ModelLoadError(f"{files.config.where}: vision_feature_layer is {feature!r}; expected one layer")
    return ModelShape(
        geometry=load_geometry(files),
        num_vision_blocks=num_blocks + 1 + feature if feature < 0 else feature,
        num_decoder_layers=_num_decoder_layers(files.config.section("text_config")),
    )


def _num_decoder_layers(text: JsonSection) -> int:
    """Layers of the LLM; published LLaVA-NeXT 7B configurations leave out what is their class's default."""
    default = _DEFAULT_NUM_LAYERS.get(text.get("model_type"))
    return text["num_hidden_layers"] if default is None else text.get("num_hidden_layers", default)


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
    if isinstance(geometry, NativeGeometry):
        num_patches, num_vision_tokens, blocks, exact = _native(geometry, plan, media)
    else:
        num_patches, num_vision_tokens, blocks, exact = _tiled(geometry, plan, media)
    exact = exact and not any(step.stage == "media" for step in plan.steps)
    blocks = _reduce(blocks, plan.at("decoder_input"))
    entering = sum(block.count for block in blocks)
    for layer in plan.layers("decoder_layer"):
        blocks = _reduce(blocks, plan.at("decoder_layer", layer))
    return TokenCounts(
        num_patches=num_patches,
        num_vision_tokens=num_vision_tokens,
        num_vision_tokens_kept=entering,
        num_decoder_tokens_kept=sum(block.count for block in blocks),
        exact=exact and all(block.exact for block in blocks),
    )


def _native(
    geometry: NativeGeometry, plan: ReductionPlan, media: Sequence[MediumShape]
) -> tuple[int, int, list[_Block], bool]:
    """Patches, unreduced vision tokens and what is left of them behind the tower, where groups are reduced."""
    if plan.layout == "released":
        raise PlanError("the released layout needs square pictures, but this model reads any shape: use geometric")
    grids = [geometry.grid_of(medium.kind, medium.num_frames, medium.height, medium.width) for medium in media]
    left = [_left_of_tile(grid.num_groups // grid.times, plan) for grid in grids]
    blocks = [
        _Block(index, time, count, exact)
        for index, (grid, (count, exact)) in enumerate(zip(grids, left, strict=True))
        for time in range(grid.times)
    ]
    return sum(grid.num_patches for grid in grids), sum(grid.num_groups for grid in grids), blocks, True


def _tiled(
    geometry: AnyresGeometry, plan: ReductionPlan, media: Sequence[MediumShape]
) -> tuple[int, int, list[_Block], bool]:
    """Patches, unreduced vision tokens and what is left of them behind the tower, where tiles are reduced."""
    if not geometry.reads_videos and any(medium.kind == "video" for medium in media):
        raise PlanError("this model reads images only, but the request holds a video; take a model that reads videos")
    tiles = [_num_tiles(geometry, medium, media) for medium in media]
    per_tile, exact = _left_of_tile(geometry.grid**2, plan)
    if plan.layout == "released" and not exact:
        raise PlanError("the released layout needs square counts, but this plan's depend on the picture: use geometric")
    blocks = [
        block
        for index, (medium, num_tiles) in enumerate(zip(media, tiles, strict=True))
        for block in _layout(geometry, plan, medium, index=index, num_tiles=num_tiles, per_tile=per_tile)
    ]
    num_vision_tokens = sum(
        geometry.num_video_tokens(medium.num_frames)
        if medium.kind == "video"
        else geometry.num_image_tokens(medium.height, medium.width, num_tiles=num_tiles)
        for medium, num_tiles in zip(media, tiles, strict=True)
    )
    return sum(tiles) * geometry.grid**2, num_vision_tokens, blocks, exact


def _check_layers(plan: ReductionPlan, stage: Stage, depth: int) -> None:
    beyond = [layer for layer in plan.layers(stage) if layer >= depth]
    if beyond:
        raise PlanError(f"the plan reduces at {stage} {beyond}, but this model has 0 to {depth - 1}")


def _num_tiles(geometry: AnyresGeometry, medium: MediumShape, media: Sequence[MediumShape]) -> int:
    if medium.kind == "video":
        return medium.num_frames
    if sum(other.kind == "image" for other in media) > 1 and not geometry.tiles_every_image:
        return 1
    rows, cols = geometry.tile_grid(medium.height, medium.width)
    return 1 + rows * cols


def _left_of_tile(num_patches: int, plan: ReductionPlan) -> tuple[int, bool]:
    """Tokens of one tile or frame after the tower, and whether the plan fixes them."""
    left, exact = num_patches, True
    reducers = [plan.at("vision_block", block) for block in plan.layers("vision_block")]
    for reducer in [*reducers, plan.at("vision_output")]:
        if reducer is not None:
            kept = reducer.num_kept(left)
            left, exact = (left, False) if kept is None else (kept, exact)
    return left, exact


def _layout(
    geometry: AnyresGeometry, plan: ReductionPlan, medium: MediumShape, *, index: int, num_tiles: int, per_tile: int
) -> list[_Block]:
    """Tokens of one medium behind projector, pooling, unpadding and newlines."""
    side = geometry.grid
    if plan.layout == "released":
        side = isqrt(per_tile)
        if side**2 != per_tile:
            raise PlanError(
                f"the released layout re-reads survivors as a square, but {per_tile} of {geometry.grid**2} tokens are "
                f"left of each tile; {side**2} or {(side + 1) ** 2} would be one. Change the budgets, or use geometric"
            )
    separator = _Block(index, -1, 1)
    if medium.kind == "video":
        # Pooling restores the grid in the geometric layout, so every frame is as large as without reduction.
        per_frame = geometry.num_video_tokens(1, side=side) - 1
        return [*(_Block(index, frame, per_frame) for frame in range(medium.num_frames)), separator]
    if num_tiles == 1:
        return [_Block(index, 0, per_tile), separator]
    if side**2 == per_tile:
        count = geometry.num_image_tokens(medium.height, medium.width, num_tiles=num_tiles, side=side)
        return [_Block(index, -1, count)]
    layout = geometry.image_layout(medium.height, medium.width)
    rows, cols = layout.shape
    whole = layout.resized is None and (rows, cols) == (layout.rows, layout.cols)
    survivors = min((num_tiles - 1) * per_tile, rows * cols)
    return [_Block(index, -1, per_tile + survivors + rows, exact=whole)]


def _reduce(blocks: list[_Block], reducer: Reducer | None) -> list[_Block]:
    """Counts after one decoder stage. Where a scope's own count is not known, nothing is taken off: an upper bound."""
    if reducer is None:
        return blocks
    several = len({block.medium for block in blocks}) > 1
    untouched: list[_Block] = []
    scopes: dict[tuple[int | None, int | None], list[_Block]] = {}
    for block in blocks:
        if reducer.per == "prompt":
            scopes.setdefault((None if several else block.medium, None), []).append(block)
        elif reducer.per == "frame" and block.frame == -1:
            untouched.append(block)
        elif block.medium is None or (reducer.per == "frame" and block.frame is None):
            untouched.append(_Block(block.medium, block.frame, block.count, exact=False))
        else:
            scopes.setdefault((block.medium, block.frame if reducer.per == "frame" else None), []).append(block)
    # Neighbouring media may share a span; how many do depends on the prompt.
    sharp = not (reducer.per == "span" and several)
    reduced = [_reduce_scope(key, members, reducer, sharp) for key, members in scopes.items()]
    return reduced + untouched


def _reduce_scope(key: tuple[int | None, int | None], members: list[_Block], reducer: Reducer, sharp: bool) -> _Block:
    total = sum(block.count for block in members)
    kept = reducer.num_kept(total)
    exact = sharp and kept is not None and all(block.exact for block in members)
    return _Block(*key, total if kept is None else kept, exact=exact)

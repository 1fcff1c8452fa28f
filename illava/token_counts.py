"""What a plan will leave of an item's tokens, from geometry alone: for `--plan`, before any weight is loaded.

Torch-free. The columns of a result row are measured, never taken from here; tests hold the two equal. The tower's
part is `illava.tower_counts`, a model's depth and geometry `illava.families.model_shape`. Knows nothing of prompts,
items or storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from illava.errors import PlanError
from illava.families.llava.geometry import AnyresGeometry
from illava.families.qwen.geometry import NativeGeometry
from illava.plan import ReductionPlan, Stage
from illava.reducers import Reducer
from illava.tower_counts import Block, MediumShape, tower_counts


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
    several = len({block.medium for block in blocks}) > 1
    untouched: list[Block] = []
    scopes: dict[tuple[int | None, int | None], list[Block]] = {}
    for block in blocks:
        if reducer.per == "prompt":
            scopes.setdefault((None if several else block.medium, None), []).append(block)
        elif reducer.per == "frame" and block.frame == -1:
            untouched.append(block)
        elif block.medium is None or (reducer.per == "frame" and block.frame is None):
            untouched.append(Block(block.medium, block.frame, block.count, exact=False))
        else:
            scopes.setdefault((block.medium, block.frame if reducer.per == "frame" else None), []).append(block)
    # Neighbouring media may share a span; how many do depends on the prompt.
    sharp = not (reducer.per == "span" and several)
    reduced = [_reduce_scope(key, members, reducer, sharp) for key, members in scopes.items()]
    return reduced + untouched


def _reduce_scope(key: tuple[int | None, int | None], members: list[Block], reducer: Reducer, sharp: bool) -> Block:
    total = sum(block.count for block in members)
    kept = reducer.num_kept(total)
    exact = sharp and kept is not None and all(block.exact for block in members)
    return Block(*key, total if kept is None else kept, exact=exact)

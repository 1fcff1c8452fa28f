"""Defines reduction plans and their steps: what is reduced where. Torch-free, so that a config is checked at once.

A plan names no model. A family's `check` says whether the plan makes sense for its model.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from illava.errors import PlanError
from illava.presets import PRESETS
from illava.reducers import AnyReducer, Stage

Layout = Literal["geometric", "released"]

# Left out of the digest of a plan that does not use them, since they came in later.
_LATER_FIELDS = ("unmerge", "budget", "epsilon", "size_bias")
_LAYERED: frozenset[Stage] = frozenset({"vision_block", "decoder_layer"})


class ReductionStep(BaseModel):
    """Puts one reducer at one stage.

    Attributes:
        stage: ``media`` (before the tower), ``vision_block`` (inside a block, between attention and MLP),
            ``vision_output`` (after the tower), ``decoder_input``, ``decoder_layer`` (before that layer).
        layers: 0-based blocks or layers for ``vision_block`` and ``decoder_layer``; empty for the other stages.
        reducer: the method and its hyper-parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    stage: Stage
    layers: tuple[int, ...] = ()
    reducer: AnyReducer

    @model_validator(mode="after")
    def _consistent(self) -> ReductionStep:
        if self.stage not in self.reducer.stages:
            sites = ", ".join(sorted(self.reducer.stages))
            raise ValueError(f"reducer {self.reducer.kind!r} cannot act at stage {self.stage!r}; it can at: {sites}")
        if self.stage in _LAYERED and not self.layers:
            raise ValueError(f"stage {self.stage!r} needs `layers`, 0-based, such as [5, 6, 7, 8]")
        if self.stage not in _LAYERED and self.layers:
            raise ValueError(f"stage {self.stage!r} takes no `layers`; got {list(self.layers)}")
        if any(n < 0 for n in self.layers) or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"`layers` must be distinct, ascending and not negative; got {list(self.layers)}")
        if getattr(self.reducer, "proportional_attention", None) and self.stage != "vision_block":
            raise ValueError(
                f"proportional attention acts in the blocks behind a vision_block step; behind {self.stage!r} there "
                "are none, and the decoder's cache holds keys of the model's own width: leave it out"
            )
        if self.stage == "decoder_layer" and 0 in self.layers:
            raise ValueError("a decoder_layer step is scored by the layer before it: the first possible layer is 1")
        return self


class Unmerge(BaseModel):
    """Restores the whole grid behind the tower's last block, before pooling or the 2x2 merger.

    The tower saves its time; as many tokens enter the LLM as without reduction, unless a later step reduces them. See
    `illava.reduction.unmerge`.

    Attributes:
        kind: ``knn_delta``: a dropped cell takes over the mean change of the kept tokens most like it.
        num_neighbours: kept tokens that a dropped cell follows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["knn_delta"] = "knn_delta"
    num_neighbours: int = Field(default=4, ge=1)


class ReductionPlan(BaseModel):
    """Lists every reduction of a request. The empty plan is the unreduced model.

    Attributes:
        layout: ``geometric`` keeps tokens at their true coordinates; ``released`` re-reads them as a k x k
            pseudo-image, as the released code does, and needs square counts.
        unmerge: whether and how the tower's steps are undone behind its last block.
        size_bias: the language model attends with log size: to every score of a visual token's key, in every layer, is
            added the log of how many visual tokens of the unreduced model it stands for. So a merged token weighs as
            much as all that are merged into it. Without effect on a token that stands for itself.
        budget, epsilon: an adaptive budget (``auto``) and its error bound, instead of steps; see
            `illava.engine.media_phase`.
        steps: in the order of the data flow; one step for each stage and layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layout: Layout = "geometric"
    unmerge: Unmerge | None = None
    size_bias: bool = False
    budget: Literal["auto"] | None = None
    epsilon: float | None = Field(default=None, gt=0.0, lt=1.0)
    steps: tuple[ReductionStep, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: object) -> object:
        """Expand `{preset: NAME}` or `{preset: NAME, layout: ...}` to the preset's plan."""
        if isinstance(data, dict) and data.get("preset") is not None:
            if data.get("steps") is not None:
                raise ValueError("give either `preset` or `steps`, not both")
            shipped = preset(data["preset"], layout=data.get("layout")).model_dump()
            return shipped | {key: data[key] for key in data if key not in ("preset", "steps", "layout")}
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if key != "preset"}
        return data

    @model_validator(mode="after")
    def _one_step_a_place(self) -> ReductionPlan:
        seen: set[tuple[Stage, int | None]] = set()
        for step in self.steps:
            for site in [(step.stage, layer) for layer in step.layers or (None,)]:
                if site in seen:
                    where = site[0] if site[1] is None else f"{site[0]} {site[1]}"
                    raise ValueError(f"two reduction steps at {where}; there can be only one")
                seen.add(site)
        return self

    @model_validator(mode="after")
    def _auto_is_all(self) -> ReductionPlan:
        if (self.budget is None) != (self.epsilon is None):
            raise ValueError("`budget: auto` goes with `epsilon`, the error it may make, such as 0.2: give both")
        fixed = self.steps or self.unmerge is not None or self.layout != "geometric" or self.size_bias
        if self.budget is not None and fixed:
            raise ValueError(
                "`budget: auto` chooses the steps itself: leave steps, preset, unmerge, layout and size_bias out"
            )
        return self

    @model_validator(mode="after")
    def _sizes_where_tokens_merge(self) -> ReductionPlan:
        if not self.size_bias:
            return self
        if not self.steps:
            raise ValueError("`size_bias` tells the model what is merged, and the plan merges nothing: leave it out")
        if self.layout == "released":
            raise ValueError(
                "`size_bias` counts the true places that a token stands for, which layout 'released' gives up: use "
                "layout 'geometric'"
            )
        return self

    @model_validator(mode="after")
    def _grids_where_needed(self) -> ReductionPlan:
        in_blocks = [self.at("vision_block", block) for block in self.layers("vision_block")]
        if self.unmerge is not None and not in_blocks:
            raise ValueError("`unmerge` restores what vision_block steps drop, and the plan has none: leave it out")
        if self.unmerge is not None and self.layout == "released":
            raise ValueError(
                "`unmerge` restores the true grid, which layout 'released' gives up: use layout 'geometric'"
            )
        behind = self.at("vision_output")
        chain = in_blocks if behind is None or self.unmerge is not None else [*in_blocks, behind]
        joining = next((reducer for reducer in chain if reducer is not None and reducer.frames_in_window), None)
        if joining is not None and self.layout == "released":
            raise ValueError(
                f"{joining.kind!r} joins frames to windows in the tower, and layout 'released' re-reads every frame's "
                "tokens as a square: use layout 'geometric'"
            )
        for before, reducer in pairwise(reducer for reducer in chain if reducer is not None):
            if reducer.merges_frames and not before.merges_frames:
                raise ValueError(
                    f"{reducer.kind!r} merges frames cell by cell, but {before.kind!r} before it leaves other cells in "
                    "every frame: put the merging first"
                )
        return self

    def at(self, stage: Stage, layer: int | None = None) -> AnyReducer | None:
        """The reducer at a stage and layer, or None."""
        for step in self.steps:
            if step.stage == stage and (layer is None or layer in step.layers):
                return step.reducer
        return None

    def layers(self, stage: Stage) -> tuple[int, ...]:
        """All layers of a stage that have a step, ascending."""
        return tuple(sorted(layer for step in self.steps if step.stage == stage for layer in step.layers))

    def digest(self) -> str:
        """Sixteen hex digits that change exactly when the plan does."""
        return dump_digest(self.model_dump(mode="json"))


def dump_digest(dump: dict[str, Any]) -> str:
    """`ReductionPlan.digest` of a plan's JSON dump, also of a dump that another version wrote."""
    fields = {key: value for key, value in dump.items() if key not in _LATER_FIELDS or value not in (None, False)}
    fields["steps"] = [step | {"reducer": _as_before(step["reducer"])} for step in fields.get("steps", ())]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _as_before(reducer: dict[str, Any]) -> dict[str, Any]:
    """A method's fields without those that came in later and are not used; two had proportional attention before."""
    later = {"max_merge_error", "max_tokens", "window", "by"}
    if reducer["kind"] not in ("tome", "ward"):
        later |= {"proportional_attention"}
    return {key: value for key, value in reducer.items() if key not in later or value}


def deprecations(plan: ReductionPlan) -> list[str]:
    """What of a plan the next release no longer has, and what is to be written in its place; one sentence each."""
    instead = (
        "write {preset: ward-document}, or a step {stage: decoder_input, reducer: {kind: ward, max_merge_error: 0.1}} "
        "with size_bias: true; at equal tokens fewer answers are lost, and choosing them takes less time "
        "(docs/plans-and-methods.md, budgets by error)"
    )
    old = ["`budget: auto`"] if plan.budget == "auto" else []
    old += [f"reducer `kind: {kind}`" for kind in sorted({s.reducer.kind for s in plan.steps if s.reducer.deprecated})]
    return [f"{what} is deprecated, and the next release no longer has it: {instead}" for what in old]


EMPTY_PLAN = ReductionPlan()


@lru_cache(maxsize=64)
def preset(name: str, *, layout: Layout | None = None) -> ReductionPlan:
    """A shipped plan by name.

    Args:
        name: one of `illava.presets.PRESETS`.
        layout: ``geometric`` unless given. ``released`` is the parity switch to the paper's code.

    Raises:
        PlanError: no such preset.
    """
    layout = layout or "geometric"
    if name not in PRESETS:
        raise PlanError(f"no preset named {name!r}; the presets are: {', '.join(sorted(PRESETS))}")
    return ReductionPlan.model_validate({"layout": layout, **PRESETS[name](layout)})

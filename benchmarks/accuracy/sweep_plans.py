"""Lists the accuracy benchmark's plans by name: presets, and equal cuts in the tower at a share of patches kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from benchmarks.accuracy.compared_plans import FILE, PREFIX, compared_plans
from illava.plan import EMPTY_PLAN, ReductionPlan, ReductionStep, preset
from illava.presets import PRESETS
from illava.reducers.attention_pruning import AttentionPruning
from illava.reducers.base import Evidence, Stage
from illava.tokens import Assignment, Tokens

BLOCKS = (2, 3, 4, 5)
NUM_PATCHES = 196
METHODS = ("illava", "attention_pruning", "tome", "ward", "random", "least_attended")
SWEEP = (
    "none",
    "illava-small",
    "illava-small:released",
    "least_attended@0.5",
    *(f"illava@{share}" for share in (0.75, 0.5, 0.25, 0.12)),
    *(f"random@{share}" for share in (0.5, 0.25, 0.12)),
    "attention_pruning@0.25",
    *(f"tome@{share}" for share in (0.5, 0.25)),
)


class LeastAttended(AttentionPruning):
    """Keeps what attention pruning drops: the control that must fail."""

    kind: str = "least_attended"  # type: ignore[assignment]
    stages: ClassVar = AttentionPruning.stages

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.reducers.ops.selection import prune_lowest

        score_T = -evidence.measured("attention_received")
        return prune_lowest(score_T, tokens.lengths, tuple(self.num_kept(n) for n in tokens.lengths))


def plan_named(name: str, *, clip: bool = False, blocks: Sequence[int] = BLOCKS) -> ReductionPlan:
    """A preset's name (``illava-small``, ``illava-small:released``), ``none``, or ``METHOD@SHARE`` such as
    ``random@0.25``: SHARE of the patches left after equal cuts in ``blocks`` of the tower. A preset that has a video
    variant (``illava-small-video``, ``ward-small-video-25``) uses it for clips.

    Raises:
        SystemExit: no plan of that name.
    """
    if name == "none":
        return EMPTY_PLAN
    if name.startswith(PREFIX):
        if name not in compared_plans():
            raise SystemExit(f"no plan named {name!r} in {FILE}; there are: {', '.join(compared_plans())}")
        return compared_plans()[name][clip]
    preset_name, _, layout = name.partition(":")
    if preset_name in PRESETS:
        if clip:
            variants = (f"{preset_name}-video", preset_name.replace("-image", "-video"))
            preset_name = next((name for name in variants if name in PRESETS), preset_name)
        return preset(preset_name, layout=layout or None)
    method, _, share = name.partition("@")
    if method not in METHODS or not _is_share(share):
        known = ", ".join([*PRESETS, *(f"{method}@SHARE" for method in METHODS)])
        raise SystemExit(f"no plan named {name!r}; the plans are: {known} (0 < SHARE < 1)")
    cuts = (NUM_PATCHES - round(NUM_PATCHES * float(share))) // len(blocks)
    if method == "least_attended":
        # Its kind is not in the registry, on purpose: the step is put together without the registry's union.
        reducer = LeastAttended(num_merged=cuts)
        step = ReductionStep.model_construct(stage="vision_block", layers=tuple(blocks), reducer=reducer)
        return ReductionPlan.model_construct(layout="geometric", steps=(step,))
    step: dict[str, Any] = {
        "stage": "vision_block",
        "layers": tuple(blocks),
        "reducer": {"kind": method, "num_merged": cuts},
    }
    return ReductionPlan.model_validate({"steps": [step]})


def patches_kept(plan: ReductionPlan) -> float:
    """Share of a tile's patches that leave the tower, from the plan."""
    count = NUM_PATCHES
    for layer in plan.layers("vision_block"):
        left = plan.at("vision_block", layer).num_kept(count)
        count = count if left is None else left
    return count / NUM_PATCHES


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False

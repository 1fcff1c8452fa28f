"""Lists what can be measured at each stage, and refuses decoder steps that need more. Torch-free.

`illava.reduction.vision` and `illava.reduction.decoder` measure it.
"""

from __future__ import annotations

from illava.errors import PlanError
from illava.plan import ReductionPlan
from illava.reducers import EvidenceKind, Stage

# What can be measured in and after a tower, by stage; a family's `check` refuses a reducer that needs more.
VISION_EVIDENCE: dict[Stage, frozenset[EvidenceKind]] = {
    "vision_block": frozenset({"attention_received", "keys", "sizes", "seed"}),
    "vision_output": frozenset({"attention_received", "keys", "sizes", "seed"}),
}
# The same in a tower with a CLS token.
CLS_EVIDENCE: dict[Stage, frozenset[EvidenceKind]] = {
    **VISION_EVIDENCE,
    "vision_block": VISION_EVIDENCE["vision_block"] | {"cls_attention"},
    "vision_output": VISION_EVIDENCE["vision_output"] | {"cls_attention"},
}
# What can be measured of the decoder, by stage.
DECODER_EVIDENCE: dict[Stage, frozenset[EvidenceKind]] = {
    "decoder_input": frozenset({"attention_received", "sizes", "seed"}),
    "decoder_layer": frozenset(
        {
            "attention_received",
            "causal_normalised_attention",
            "last_query_attention",
            "own_layer_query_attention",
            "keys",
            "sizes",
            "seed",
        }
    ),
}


def check_decoder_steps(plan: ReductionPlan, num_layers: int) -> None:
    """Refuse decoder steps that cannot run.

    Raises:
        PlanError: a layer out of range, or evidence that no decoder layer has.
    """
    for step in plan.steps:
        if step.stage not in DECODER_EVIDENCE:
            continue
        if step.layers and step.layers[-1] >= num_layers:
            raise PlanError(
                f"the plan reduces before decoder layer {step.layers[-1]}; the last is {num_layers - 1}: choose "
                f"`layers` from 1 to {num_layers - 1}"
            )
        lacking = step.reducer.evidence(step.stage) - DECODER_EVIDENCE[step.stage]
        if lacking:
            raise PlanError(f"{step.reducer.kind!r} needs {', '.join(sorted(lacking))}: not known at {step.stage}")

"""Lists what can be measured at each stage, and refuses decoder steps that need more. Torch-free.

`illava.reduction.vision` and `illava.reduction.decoder` measure it.
"""

from __future__ import annotations

from collections.abc import Sequence

from illava.errors import PlanError
from illava.plan import ReductionPlan, ReductionStep
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


# Of the layer before a step, which must attend; a recurrent layer has neither attention nor keys.
_OF_LAYER_BEFORE = frozenset({"attention_received", "causal_normalised_attention", "last_query_attention", "keys"})
_OF_OWN_LAYER = frozenset({"own_layer_query_attention"})


def check_decoder_steps(plan: ReductionPlan, num_layers: int, attention_layers: Sequence[int]) -> None:
    """Refuse decoder steps that cannot run.

    Args:
        plan: the plan in question.
        num_layers: of the decoder.
        attention_layers: those of them that attend; the others are recurrent.

    Raises:
        PlanError: a layer out of range, or evidence that no decoder layer has, or not the layer that would be asked.
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
        if step.stage == "decoder_layer":
            _check_scoring_layers(step, attention_layers)


def _check_scoring_layers(step: ReductionStep, attention_layers: Sequence[int]) -> None:
    """Refuse a step whose scores would be those of a recurrent layer; say before which layers it can act."""
    needed = step.reducer.evidence(step.stage)
    for evidence, before in ((_OF_LAYER_BEFORE, 1), (_OF_OWN_LAYER, 0)):
        places = [layer + before for layer in attention_layers]
        asked = [layer for layer in step.layers if needed & evidence and layer not in places]
        if asked:
            whose, where = "the layer before" if before else "the layer itself", ", ".join(map(str, asked))
            found = [str(layer) for layer in places if 0 < layer <= max(attention_layers)]
            choices = f"choose `layers` among {', '.join(found)}" if found else "no layer of this model would do"
            raise PlanError(
                f"{step.reducer.kind!r} at decoder_layer {where} scores tokens by the attention of {whose}, which is "
                f"recurrent and has none; {choices}: full-attention layers are {', '.join(map(str, attention_layers))}"
            )

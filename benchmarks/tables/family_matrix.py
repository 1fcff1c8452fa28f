"""Which method runs where in which model family: asked of each family's own `check`, on tiny random models.

One setting a method and one step at a time. Serves README's table and tests/illava/families/test_family_matrix.py, so
that what the table says is what the test runs. Knows no family and no reducer beyond their registries.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from illava.errors import PlanError  # noqa: E402
from illava.families.base import Family  # noqa: E402
from illava.plan import ReductionPlan  # noqa: E402
from illava.reducers import REDUCERS, Reducer, Stage  # noqa: E402

STAGES: tuple[Stage, ...] = get_args(Stage)
LETTERS = {"media": "M", "vision_block": "B", "vision_output": "O", "decoder_input": "I", "decoder_layer": "L"}
# model_type -> what writes a tiny random folder of it: module of tests/ and function
MAKERS = {
    "llava_onevision": "tests.support.models.onevision:make_onevision",
    "llava_next": "tests.support.models.llava_next:make_llava_next",
    "qwen2_vl": "tests.support.models.qwen:make_qwen2_vl",
    "qwen2_5_vl": "tests.support.models.qwen:make_qwen2_5_vl",
    "qwen3_vl": "tests.support.models.qwen:make_qwen3_vl",
}
# Tried in this order; a method takes the first that its fields allow.
_SCORER = {"model_id": "scorer"}  # `check` loads none; what runs a plan puts a folder here
_BUDGETS: tuple[dict[str, Any], ...] = (
    {"keep_ratio": 0.6},
    {"grid": (2, 2)},
    {},
    {"keep_ratio": 0.6, "scorer": _SCORER},
    {"scorer": _SCORER},
    {"epsilon": 0.5},
)


def _settings() -> dict[str, dict[str, Any]]:
    """The `reducer:` of a plan by the name of its row: every method with one budget, and where it can use CLS, that."""
    found: dict[str, dict[str, Any]] = {}
    for kind, reducer in REDUCERS.items():
        found[kind] = {"kind": kind, **next(budget for budget in _BUDGETS if _fits(reducer, kind, budget))}
        if "saliency" in reducer.model_fields:
            found[f"{kind}, CLS"] = {**found[kind], "saliency": "cls_attention"}
    return found


def _fits(reducer: type[Reducer], kind: str, budget: dict[str, Any]) -> bool:
    try:
        reducer(kind=kind, **budget)
    except ValueError:
        return False
    return True


SETTINGS = _settings()


def make_folder(model_type: str, folder: Path) -> Path:
    """A tiny random model of this family."""
    module, name = MAKERS[model_type].split(":")
    return getattr(import_module(module), name)(folder)


def candidates(family: Family, setting: dict[str, Any], stage: Stage) -> list[ReductionPlan]:
    """Plans of this one step, one for each block or layer it could act at.

    Raises:
        pydantic.ValidationError: the method says itself that it cannot act at this stage.
    """
    places: list[tuple[int, ...]] = [()]
    if stage == "vision_block":
        places = [(block,) for block in range(family.num_vision_blocks)]
    elif stage == "decoder_layer":
        places = [(layer,) for layer in range(1, family.decoder.num_layers)]
    step = {"stage": stage, "reducer": setting}
    return [ReductionPlan.model_validate({"steps": [{**step, "layers": layers}]}) for layers in places]


def plan_of(family: Family, setting: dict[str, Any], stage: Stage) -> ReductionPlan:
    """The first of the candidates that the family accepts.

    Raises:
        PlanError: it accepts none; says why of the first.
        pydantic.ValidationError: the method says itself that it cannot act at this stage.
    """
    refusals: list[PlanError] = []
    for plan in candidates(family, setting, stage):
        try:
            family.check(plan)
        except PlanError as refusal:
            refusals.append(refusal)
        else:
            return plan
    raise refusals[0]


def stages_of(family: Family, setting: dict[str, Any]) -> tuple[Stage, ...]:
    """The stages at which the method runs in this family, in the order of the data flow."""
    found: list[Stage] = []
    for stage in STAGES:
        if stage not in REDUCERS[setting["kind"]].stages:
            continue
        try:
            plan_of(family, setting, stage)
        except PlanError:
            continue
        found.append(stage)
    return tuple(found)


def cell_of(family: Family, setting: dict[str, Any]) -> str:
    """The table's cell: a letter a stage, ``-`` where the method is refused everywhere."""
    return "".join(LETTERS[stage] for stage in stages_of(family, setting)) or "-"

"""A plan may be given by name, as a dict or as a YAML file; what is none of these is said in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from illava.errors import PlanError
from illava.plan import EMPTY_PLAN, ReductionPlan, preset
from illava.plan_input.resolve import resolve_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS = {"steps": [{"stage": "decoder_input", "reducer": {"kind": "illava", "keep_ratio": 0.5}}]}
OWN = ReductionPlan.model_validate(STEPS)


@pytest.mark.parametrize(
    ("source", "plan"),
    [
        ("illava-video", preset("illava-video")),
        (OWN, OWN),
        (STEPS, OWN),
        ({"preset": "illava-video", "layout": "released"}, preset("illava-video", layout="released")),
        ({"reduction": STEPS, "model": {"model_id": "m"}}, OWN),
        ({}, EMPTY_PLAN),
        (CONFIGS / "caption_videos_qwen2_vl.yaml", preset("ward-qwen2-vl-25")),
        (str(CONFIGS / "demo.yaml"), preset("ward-small-video-25")),
    ],
)
def test_every_way_to_give_a_plan(source, plan):
    assert resolve_plan(source) == plan


def test_a_file_of_one_plan_by_its_path(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text("layout: released\npreset: illava-video\n")
    assert resolve_plan(path) == resolve_plan(str(path)) == preset("illava-video", layout="released")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("illava-vidoe", "no preset named 'illava-vidoe'; did you mean 'illava-video'.*path of a YAML file"),
        ("nowhere/plan.yaml", "plan nowhere/plan.yaml: there is no such file"),
        (None, "plan is a NoneType: give the name of a preset, a dict.*'none' is the unreduced model"),
        (
            {"steps": [{"stage": "decoder_input", "reducer": {"kind": "illava", "keep_ratio": 7}}]},
            r"plan: steps.0.reducer.keep_ratio: Input should be less than 1 \(got 7\)",
        ),
        ({"stepz": []}, "plan: stepz: unknown key"),
        ({"steps": [{"stage": "decoder_input"}]}, "plan: steps.0.reducer: missing"),
        ({"steps": [{"stage": "decoder_input", "reducer": {"kind": "ilava"}}]}, "did you mean 'illava'"),
        ({"preset": "illava-vidoe"}, "no preset named 'illava-vidoe'"),
    ],
)
def test_what_is_no_plan_is_said_in_words(source, message):
    with pytest.raises(PlanError, match=message) as refused:
        resolve_plan(source)
    assert "Value error" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys such as `preset:` or `steps:`, got nothing"),
        ("- a\n", "got a list"),
        ("preset: [\n", "is not YAML"),
        ("preset: none\npreset: illava-video\n", "line 2: `preset` stands on line 1 already"),
        ("model: {model_id: m}\n", "is a job without a section `reduction`"),
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path, text, message):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=message) as refused:
        resolve_plan(str(path))
    assert str(path) in str(refused.value)


AUTO = {"budget": "auto", "epsilon": 0.2}
BOUNDED = {"steps": [{"stage": "decoder_input", "reducer": {"kind": "bounded_error", "epsilon": 0.2}}]}


@pytest.mark.parametrize(("source", "old"), [(AUTO, "`budget: auto`"), (BOUNDED, "`kind: bounded_error`")])
def test_what_the_next_release_drops_is_said_with_what_takes_its_place(source, old):
    for given in (source, ReductionPlan.model_validate(source)):
        with pytest.warns(DeprecationWarning, match=f"{old} is deprecated.*preset: ward-document.*size_bias: true"):
            assert resolve_plan(given) == ReductionPlan.model_validate(source)


def test_nothing_is_said_of_a_plan_that_stays(recwarn):
    for source in ("ward-document", STEPS, "none"):
        resolve_plan(source)
    assert not recwarn.list


def test_what_takes_a_deprecated_budgets_place_is_what_the_preset_does():
    step = {"stage": "decoder_input", "reducer": {"kind": "ward", "max_merge_error": 0.1}}
    assert preset("ward-document") == ReductionPlan.model_validate({"size_bias": True, "steps": [step]})

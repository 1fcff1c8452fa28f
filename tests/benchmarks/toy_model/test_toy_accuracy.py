# ruff: noqa: E402
"""The accuracy benchmark: every answer equal to `VLM.generate`'s, work that is kept and merged, true findings."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.closeness import assert_close

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy import accuracy
from benchmarks.accuracy import store as accuracy_store
from benchmarks.accuracy.answering import Answerer, SharedEncoding
from benchmarks.accuracy.findings import findings
from benchmarks.accuracy.shared_tower import untouched_blocks
from benchmarks.accuracy.store import Setting, Unit, keep, unfinished
from benchmarks.accuracy.sweep_plans import BLOCKS, METHODS, SWEEP, patches_kept, plan_named
from benchmarks.toy_model.data.testset import load_sample, sample_names

MODEL = str(accuracy.MODEL)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(MODEL)


@pytest.mark.parametrize("plan", ["none", "illava-small:released", "tome@0.5"])
@pytest.mark.parametrize("kinds", [("scene", "chart", "pair"), ("motion",)])
def test_shared_tower_passes_answer_as_plain_generate_does(answerer: Answerer, plan: str, kinds: tuple[str, ...]):
    """Every question alone in an untouched `VLM.generate`, against all of them with one tower pass a picture."""
    samples = [load_sample((kind, 900_000)) for kind in kinds]
    reduction = plan_named(plan, clip=samples[0].is_clip)
    found = answerer.answer(samples, reduction)
    for sample, texts in zip(samples, found.texts, strict=True):
        alone = [
            generation.text.strip()
            for request in answerer._requests(sample)
            for generation in answerer.plain.generate([request], plan=reduction)
        ]
        assert texts == alone
    assert answerer.disagreements(samples, [texts[0] for texts in found.texts], reduction) == 0
    assert answerer.disagreements(samples, ["something else"] * len(samples), reduction) == len(samples)


def test_a_picture_goes_through_the_tower_once_a_plan(answerer: Answerer):
    sample = load_sample(("scene", 900_001))
    mm_item = answerer._media(sample)[0]
    passes = []

    class Family:
        def encode(self, media, plan, *, trace, seeds, probe=None):
            passes.append((len(media), plan, seeds))
            return [object() for _ in media]

    shared, none, half = SharedEncoding(Family()), plan_named("none"), plan_named("random@0.5")
    first = shared.encode([mm_item, mm_item], none, trace=False, seeds=[7, 8])
    assert first[0] is first[1] is shared.encode([mm_item], none, trace=False, seeds=[9])[0]
    shared.forget()
    assert shared.encode([mm_item], half, trace=False, seeds=[9])[0] is not first[0]
    assert passes == [(1, none, [7]), (1, half, [9])]


@pytest.mark.parametrize(
    "plan", ["none", "illava-small:released", "tome@0.5", "random@0.5", "compare:pixel_prune, own count"]
)
def test_what_plans_share_of_the_tower_is_what_each_would_compute(answerer: Answerer, plan: str):
    """Features and places against the untouched family, at first and from remembered states."""
    answerer.forget()
    media, reduction = answerer._media(load_sample(("chart", 900_000))), plan_named(plan)
    (wanted,) = answerer.plain.family.encode(media, reduction, trace=False, seeds=[3])
    family = answerer._shared._family
    num_run, later = [], answerer.tower.num_later
    for _ in range(2):
        (found,) = family.encode(media, reduction, trace=False, seeds=[3])
        assert_close(found.feature_KD, wanted.feature_KD)
        assert torch.equal(found.coord_K3, wanted.coord_K3)
        num_run.append(answerer.tower.num_run)
    assert num_run[0] == num_run[1], "what was known was run again"
    apart = 2 if plan == "random@0.5" else 1  # of the picture's two tiles, which are equal
    assert answerer.tower.num_later - later == 2 * apart


def test_blocks_that_a_plan_leaves_alone():
    at = {name: untouched_blocks(plan_named(name), 10) for name in ("none", "illava@0.5", "compare:visionzip@25%")}
    assert at == {"none": 10, "illava@0.5": 2, "compare:visionzip@25%": 2}
    assert untouched_blocks(plan_named("compare:prumerge+, own count"), 10) == 9, "its last block is measured"
    assert untouched_blocks(plan_named("compare:fastv before layer 2@25%"), 10) == 10


def test_a_small_run_writes_json_table_and_plot_and_goes_on(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accuracy_store, "PARTS", 1)
    result, plot = tmp_path / "a.json", tmp_path / "a.svg"
    command = ["--scale", "0.001", "--work-dir", str(tmp_path / "work"), "--json", str(result), "--svg", str(plot)]
    accuracy.main([*command, "--plans", "least_attended@0.5"])
    next((tmp_path / "work").rglob("clips_*.json")).unlink()  # as if the run had been stopped
    answered: list[Unit] = []
    answer = accuracy.answer_units
    monkeypatch.setattr(accuracy, "answer_units", lambda *what: answered.extend(what[1]) or answer(*what))
    plans = ["none", "least_attended@0.5", "illava-small"]
    accuracy.main([*command, "--plans", *plans])
    assert len(answered) == 3, "what lay there is answered again, or what was missing is not"
    assert {unit.group for unit in answered if unit.plan != "illava-small"} == {"clips"}
    found = json.loads(result.read_text())
    assert list(found["plans"]) == plans
    assert found["asked_again"] >= 3
    assert found["answered_otherwise"] == 0
    assert found["plans"]["none"]["kept_ratio"] == found["plans"]["none"]["clip_last_layer_ratio"] == 1.0
    assert found["plans"]["illava-small"]["last_layer_ratio"] < 0.4
    assert "least attended half" in found["findings"]
    for plan in found["plans"].values():
        for row in plan["tasks"].values():
            assert row["low"] <= row["accuracy"] <= row["high"]
    table = capsys.readouterr().out
    assert all(f"| {plan} |" in table for plan in plans)
    assert all(task in plot.read_text() for task in found["plans"]["none"]["tasks"])


def test_equal_work_is_found_again_and_other_weights_find_none_of_it(tmp_path: Path):
    models = {name: tmp_path / name for name in ("first", "second")}
    for name, folder in models.items():
        folder.mkdir()
        (folder / "model.safetensors").write_text(name)
    setting, plans = Setting(str(models["first"]), 1.0, 0, (), BLOCKS), ["none", "illava@0.5"]
    everything = unfinished(setting, plans, tmp_path)
    assert len(everything) == 2 * 2 * accuracy_store.PARTS
    for unit in everything:
        keep(setting, unit, {}, tmp_path)
    assert unfinished(setting, plans, tmp_path) == []
    both = "compare:illava and pooling@50%, clips"
    compared = [*plans, "compare:illava@50%", both, "compare:evs@25%, clips"]
    more = unfinished(replace(setting, third_party=("mnist",)), compared, tmp_path)
    assert {(unit.plan, unit.group) for unit in more} == {
        *((both, "clips"), ("compare:evs@25%, clips", "clips")),  # their pictures' plans were asked
        *(("none", "mnist"), ("illava@0.5", "mnist")),
    }
    for other in ({"model": str(models["second"])}, {"scale": 0.5}, {"first_seed": 1}):
        assert unfinished(replace(setting, **other), plans, tmp_path) == everything
    moved = unfinished(replace(setting, blocks=(3, 4, 5, 6)), plans, tmp_path)
    assert {unit.plan for unit in moved} == {"illava@0.5"}


def _parts(rights: dict[str, list[bool]]) -> dict[str, list[dict]]:
    rows = {
        plan: [
            [f"scene/{n}", "small_where", "Where?", "left", "left" if right else "top"] for n, right in enumerate(own)
        ]
        for plan, own in rights.items()
    }
    return {plan: [{"answers": own}] for plan, own in rows.items()}


def test_findings_tell_a_working_instrument_from_a_broken_one():
    right, mixed = [True] * 100, [True, False] * 50
    good = findings(
        _parts({"none": right, "illava@0.25": right, "random@0.25": mixed, "random@0.5": right})
        | _parts({"least_attended@0.5": [False] * 100})
    )
    assert good["illava over random at 25 %, small objects"]["separated"]
    assert good["least attended half"]["collapses"]
    assert good["random sweep"]["monotone"]
    bad = findings(_parts({"none": right, "illava@0.25": mixed, "random@0.25": right, "random@0.5": mixed}))
    assert not bad["illava over random at 25 %, small objects"]["separated"]
    assert [rise["to"] for rise in bad["random sweep"]["rises"]] == ["random@0.25"]


def test_plan_names():
    assert plan_named("none").steps == ()
    assert plan_named("illava-small", clip=True) != plan_named("illava-small")
    assert plan_named("illava-small:released").layout == "released"
    for method in METHODS:
        assert plan_named(f"{method}@0.5").layers("vision_block") == (2, 3, 4, 5)
        assert plan_named(f"{method}@0.5", blocks=(5, 6)).layers("vision_block") == (5, 6)
        assert patches_kept(plan_named(f"{method}@0.25")) == pytest.approx(0.25, abs=0.02)
    assert [plan_named(name) for name in SWEEP]
    for nonsense in ("nonsense", "random@2", "random@x"):
        with pytest.raises(SystemExit, match=f"no plan named '{nonsense}'"):
            plan_named(nonsense)


def test_the_sweep_has_pictures_clips_and_fresh_samples():
    names = sample_names()
    assert len({name for name in names if name[0] in ("motion", "order", "flashes")}) == 300
    assert len({name for name in names if name[0] in ("scene", "chart", "table", "lines")}) == 2000
    assert not set(names) & set(sample_names(first_seed=10_000))

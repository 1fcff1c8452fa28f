"""What is concluded from the toys' answers: who leads where, agreement beside accuracy, counted work, their tables.

Time: 5 s of one core; counting work, 25 s, is in the long suite.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.accuracy import accuracy, agreement, plan_work
from benchmarks.accuracy.answering import Answerer
from benchmarks.accuracy.compared_plans import compared_plans
from benchmarks.accuracy.leads import RECOMMENDED, leads
from benchmarks.accuracy.store import BUNDLED, SECOND, weights_digest
from benchmarks.accuracy.sweep_plans import plan_named
from benchmarks.common.result_files import RESULTS
from benchmarks.speed import preset_work
from benchmarks.tables import accuracy_tables
from benchmarks.toy_model.data.testset import load_sample
from illava.analysis.agreement import measure_agreement
from illava.plan import EMPTY_PLAN

MODEL = str(accuracy.MODEL)


def parts(right: dict[str, dict[str, list[bool]]]) -> dict[str, list[dict]]:
    """Answers by plan and task: a sample each, a clip's where the task is a video's."""
    found = {}
    for plan, own in right.items():
        rows = [
            [
                f"{'motion' if task.startswith('video') else 'scene'}/{task}{n}",
                task,
                "Where?",
                "left",
                "left" if ok else "top",
            ]
            for task, oks in own.items()
            for n, ok in enumerate(oks)
        ]
        found[plan] = [{"answers": rows}]
    return found


ALL, MOST, HALF = [True] * 200, [True] * 192 + [False] * 8, [True, False] * 100


def test_a_row_is_led_by_the_best_or_by_who_is_within_its_interval() -> None:
    answers = parts(
        {
            "none": {"scene_where": ALL, "chart_value": ALL, "video_direction": ALL},
            "compare:ward@25%": {"scene_where": MOST, "chart_value": HALF, "video_direction": ALL},
            "compare:ward, blocks 2 to 5@25%": {"scene_where": ALL, "chart_value": ALL, "video_direction": ALL},
            "compare:divprune@25%": {"scene_where": ALL, "chart_value": MOST, "video_direction": HALF},
            "compare:illava@25%, layout released": {"scene_where": ALL, "chart_value": ALL, "video_direction": ALL},
            "compare:illava@50%": {"scene_where": ALL, "chart_value": ALL, "video_direction": ALL},
        }
    )
    found = leads(answers, {})
    assert list(found) == ["tower, 25%"], "no other place has a rival and ours"
    entry = found["tower, 25%"]
    assert {row: one["best"] for row, one in entry["rows"].items()} == dict.fromkeys(
        ("scene", "chart", "direction"), "divprune@25%"
    ), "neither our own variants, nor another layout, nor another share"
    assert [one["leads"] for one in entry["rows"].values()] == [False, False, True]
    assert not entry["leads_everywhere"]
    assert entry["all"]["difference"] == pytest.approx(-108 / 600, abs=1e-4)
    assert (entry["all"]["bound"], entry["all"]["holds"]) == (-0.02, False)
    assert "at_equal_work" not in entry, "nothing was counted"


def test_work_chooses_whom_a_plan_stands_beside_and_clips_are_judged_by_clips() -> None:
    half_of_pictures = {"scene_where": HALF, "video_direction": ALL}
    answers = parts(
        {
            "none": {"scene_where": ALL, "video_direction": ALL},
            "compare:ward@50%": {"scene_where": ALL, "video_direction": ALL},
            "compare:ward and ward@50%, clips": {"scene_where": ALL, "video_direction": MOST},
            "compare:illava and pooling@50%, clips": {"scene_where": ALL, "video_direction": HALF},
            "compare:tome@25%": half_of_pictures,
        }
    )
    own = {"pictures": 1.0, "clips": 0.7}
    work = {
        "compare:ward and ward@50%, clips": own,
        "compare:illava and pooling@50%, clips": own,
        "compare:tome@25%": {"pictures": 0.4, "clips": 0.6},
    }
    entry = leads(answers, work)["both, 50%"]
    assert (entry["at_equal_tokens"]["best"], entry["at_equal_work"]["best"]) == (
        "illava and pooling@50%, clips",
        "tome@25%",
    )
    assert entry["at_equal_work"]["difference"] == pytest.approx(-0.04), "its lost pictures are no matter here"
    dearer = work | {"compare:tome@25%": {"pictures": 0.4, "clips": 0.8}}
    assert leads(answers, dearer)["both, 50%"]["at_equal_work"]["best"] == "illava and pooling@50%, clips"
    mixed = leads(answers, work)[f"{RECOMMENDED}, 50%"]["all"]
    assert (mixed["lost"], mixed["num_questions"], mixed["holds"]) == (8, 400, False)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(MODEL)


def test_agreement_over_shared_tower_passes_is_that_of_an_untouched_model(answerer: Answerer) -> None:
    samples = [load_sample(("scene", 41_000)), load_sample(("table", 41_000))]
    requests = [request for one in samples for request in answerer._requests(one)]
    eighth = plan_named("compare:illava@12%")
    found = answerer.agreement(samples, eighth)
    alone = measure_agreement(answerer.plain, requests, eighth)
    assert [one.reference.token_ids for one in found] == [one.reference.token_ids for one in alone]
    # other shapes of products, summed in another order, through ten blocks and six layers
    assert [one.kl_nats for one in found] == pytest.approx([one.kl_nats for one in alone], rel=1e-2, abs=1e-4)
    assert max(one.kl_nats for one in alone) > 1e-3, "the plan changes something"
    again = answerer.agreement(samples, EMPTY_PLAN)
    assert max(one.kl_nats for one in again) < 1e-5, "what the tower made under one plan is not taken for another's"
    assert all(one.num_same == one.num_tokens for one in again)


def test_a_small_run_measures_each_plan_once_a_side(answerer: Answerer, tmp_path: Path, monkeypatch) -> None:
    listed = list(agreement.measured_plans(answerer.plain.family))
    keys = [(side, plan.digest()) for _, side, plan in listed]
    assert len(set(keys)) == len(keys)
    names = {name for name, _, _ in listed}
    assert {"ward-small-image-25", "ward-small-video-25", "ward-document", "illava-small", "tome-small-video"} <= names
    assert {"illava@12%", "divprune@25%", "ward@12%", "divprune and evs@25%, clips"} <= names
    assert "illava-image" not in names, "made for 729 patches"
    two = [one for one in listed if one[0] in ("ward-small-image-25", "ward-small-video-25")]
    monkeypatch.setattr(agreement, "measured_plans", lambda family: two)
    monkeypatch.setattr(agreement, "SAMPLES", {"scene": 20, "motion": 20})
    agreement.main(["--scale", "0.1", "--json", str(tmp_path / "a.json")])
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["samples"] == {"scene": 2, "motion": 2}
    for name, side in (("ward-small-image-25", "pictures"), ("ward-small-video-25", "clips")):
        own = result["plans"][name][side]
        assert own["num_samples"] == 2
        for interval in (own["top1_ratio"], own["kl_nats"]):
            assert 0 <= interval["low"] <= interval["mean"] <= interval["high"]


@pytest.mark.long
def test_counted_work_is_that_of_the_committed_file(monkeypatch) -> None:
    """Two plans of 47; counts of products do not depend on a machine."""
    names = ("compare:ward@25%", "compare:evs@25%, clips")
    monkeypatch.setattr(plan_work, "compared_plans", lambda: {name: compared_plans()[name] for name in names})
    committed = json.loads((RESULTS / "plan_work.json").read_text())["plans"]
    found = plan_work.plan_work(MODEL)
    for name in names:
        assert found[name] == pytest.approx(committed[name], rel=0.01)
    assert found["compare:evs@25%, clips"]["pictures"] == 1.0


@pytest.mark.long
def test_work_at_published_shapes_is_that_of_the_committed_file() -> None:
    committed = json.loads((RESULTS / "preset_work_7b.json").read_text())["presets"]
    found = preset_work.measure("7b")
    assert found.keys() == committed.keys()
    for name, own in found.items():
        assert own["times_less"] == pytest.approx(committed[name]["times_less"], rel=0.01)
        assert own["tokens"] == committed[name]["tokens"]


def test_both_toys_of_the_tables_are_in_the_repository_and_asked_alike() -> None:
    folders = (BUNDLED, SECOND)
    answers = [found for found in accuracy_tables.toys("accuracy") if accuracy_tables.compares(found)]
    moves = accuracy_tables.toys("agreement")
    digests = [weights_digest(str(folder)) for folder in folders]
    assert digests[0] != digests[1]
    assert [found["setting"]["weights"] for found in answers] == digests
    assert [found["weights"] for found in moves] == digests
    for field in ("test_set", "num_questions"):
        assert answers[0][field] == answers[1][field]
    assert [list(found["plans"]) for found in answers] == [["none", *compared_plans()]] * 2
    assert moves[0]["samples"] == moves[1]["samples"]
    assert moves[0]["plans"].keys() == moves[1]["plans"].keys()


def test_tables_put_toys_side_by_side_and_the_bundled_one_first(monkeypatch) -> None:
    own = next(found for found in accuracy_tables.toys("accuracy") if accuracy_tables.compares(found))
    other = json.loads(json.dumps(own))
    other["model"], other["setting"]["weights"] = "another_toy", "0" * 16
    chart = other["leads"]["tower, 25%"]["rows"]["chart"]
    chart |= {"difference": -0.08, "difference_low": -0.1, "difference_high": -0.05, "leads": False}
    monkeypatch.setattr(accuracy_tables, "results", lambda name: [other, own] if name == "accuracy" else [])
    lines = [line for line in accuracy_tables.leads_table().splitlines() if line.startswith("| tower, 25%")]
    assert [line.split(" | ")[1] for line in lines] == ["bundled model", "another toy"]
    assert "**behind: -8.0 [-10.0, -5.0]**" in lines[1]
    assert "behind" not in lines[0]
    assert accuracy_tables.compared_table().index("**bundled model**") == 0

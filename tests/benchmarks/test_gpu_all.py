"""The one GPU run: budgets that leave partial results, goals that stay open, and every part on CPU at tiny shapes."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common.machine import describe_machine
from benchmarks.speed import gpu_all
from benchmarks.speed.gpu_all import GOALS, PARTS, TOTAL_S, judged, run_all, run_part
from benchmarks.speed.gpu_parts import Bench
from benchmarks.speed.roofline import Ceilings, Work, share


def bench_without_model():
    blank = dict.fromkeys(("model", "preprocessor", "clock", "plan", "preset", "num_frames", "new_tokens", "num_jobs"))
    return Bench(vlm=SimpleNamespace(cancel_all=lambda: []), num_rounds=10**6, **blank)


def test_a_part_that_hangs_keeps_what_it_had():
    def hangs(bench, result):
        result["first"] = 1.0
        time.sleep(60)
        result["second"] = 2.0

    found = run_part(bench_without_model(), hangs, 1.0)
    assert found["first"] == 1.0
    assert "second" not in found
    assert found["status"].startswith("out of time")
    assert found["taken_s"] < 30


def test_rounds_end_by_themselves_before_the_budget(monkeypatch):
    """On a clock of its own: a tenth of the budget is left for the last round's end."""
    clock = SimpleNamespace(now_s=0.0)
    for module in (gpu_all, gpu_all.gpu_parts):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now_s))

    def patient(bench, result):
        for number in bench.rounds(bench.num_rounds):
            result["rounds"] = number + 1
            clock.now_s += 0.25

    found = run_part(bench_without_model(), patient, 40.0)
    assert (found["status"], found["rounds"], found["taken_s"]) == ("ok", 144, 36.0)


def test_one_failed_part_costs_no_other_its_figures(monkeypatch):
    def fails(bench, result):
        raise RuntimeError("no such kernel")

    parts = (("bad", fails, 5), ("good", lambda bench, result: result.update(value=3), 5))
    monkeypatch.setattr(gpu_all, "PARTS", parts)
    written = []
    run_all(bench_without_model(), total_s=100, write=lambda found: written.append(json.dumps(found)))
    assert json.loads(written[-1])["bad"]["status"] == "failed: RuntimeError: no such kernel"
    assert json.loads(written[-1])["good"]["value"] == 3
    assert len(written) == 2  # the file stands after each part


def test_wrong_results_end_the_run_and_parts_can_be_chosen(monkeypatch):
    parts = (
        ("first", lambda bench, result: result.update(value=1), 5),
        ("correctness", lambda bench, result: result.update(missed=["MISS a kernel"]), 5),
        ("figures", lambda bench, result: result.update(value=3), 5),
    )
    monkeypatch.setattr(gpu_all, "PARTS", parts)
    found = run_all(bench_without_model(), total_s=100, write=lambda found: None)
    assert list(found) == ["first", "correctness"]
    found = run_all(bench_without_model(), total_s=100, write=lambda found: None, wanted=["figures"])
    assert list(found) == ["figures"]


def test_a_machine_without_git_is_described_and_a_copy_of_the_tree_can_say_its_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("ILLAVA_COMMIT", raising=False)
    assert describe_machine()["commit"] is None
    monkeypatch.setenv("ILLAVA_COMMIT", "abc1234")
    assert describe_machine()["commit"] == "abc1234"


def test_what_was_not_measured_stays_open():
    found = judged({"memory": {"status": "ok", "kv_ratio": 0.5}})
    assert found["key/value bytes per item"] == {"goal": "<= 0.4", "measured": 0.5, "held": False}
    assert {goal["held"] for name, goal in found.items() if name != "key/value bytes per item"} == {"open"}


def test_the_budgets_fit_into_nine_minutes():
    assert sum(seconds for *_, seconds in PARTS) < TOTAL_S - 30
    assert TOTAL_S < 9 * 60


def test_a_share_is_of_the_ceiling_that_is_nearer():
    found = share(Work(flops=100.0, num_bytes=10.0), 4.0, Ceilings(flops_per_s=50.0, bytes_per_s=10.0))
    assert (found["bound"], found["ideal_s"], found["share"]) == ("arithmetic", 2.0, 0.5)


@pytest.mark.long
def test_every_part_runs_on_cpu_and_measures_every_goal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--dry-run", "--json", str(tmp_path / "dry.json")])
    small = {"batch_8": gpu_all.gpu_parts.batch_of(2), "batch_32": gpu_all.gpu_parts.batch_of(3)}
    parts = tuple((name, small.get(name, part), seconds) for name, part, seconds in PARTS)
    monkeypatch.setattr(gpu_all, "PARTS", parts)
    gpu_all.main()
    written = json.loads((tmp_path / "dry.json").read_text())
    assert {name: part["status"] for name, part in written["parts"].items()} == {name: "ok" for name, *_ in PARTS}
    assert set(written["goals"]) == set(GOALS)
    assert all(goal["held"] != "open" for goal in written["goals"].values())
    assert 0 < written["parts"]["pipeline"]["plan"]["pipeline"]["busy"] <= 1
    assert written["setting"]["kernels"] == "torch"
    assert written["machine"]["torch"] == torch.__version__

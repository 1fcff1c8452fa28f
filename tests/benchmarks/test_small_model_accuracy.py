# ruff: noqa: E402
"""The accuracy benchmark: every plan through the real VLM, compared pairwise, written as JSON, table and plot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import accuracy
from benchmarks.small_model.render_demo_clips import render
from benchmarks.small_model.sweep_plans import METHODS, plan_named


def test_a_small_run_writes_json_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture):
    plans = ["none", "illava-small", "random@0.5", "least_attended@0.25"]
    result, plot = tmp_path / "a.json", tmp_path / "a.svg"
    command = ["--scale", "0.001", "--plans", *plans, "--json", str(result), "--svg", str(plot), "--threads", "1"]
    accuracy.main(command)
    found = json.loads(result.read_text())["plans"]
    assert list(found) == plans
    assert found["none"]["kept_ratio"] == 1.0
    assert found["illava-small"]["kept_ratio"] < 0.6
    assert found["random@0.5"]["kept_ratio"] == pytest.approx(0.52, abs=0.02)  # newlines stay
    assert found["least_attended@0.25"]["kept_ratio"] < 0.3
    for plan in found.values():
        for row in plan["tasks"].values():
            assert row["low"] <= row["accuracy"] <= row["high"]
    table = capsys.readouterr().out
    assert all(f"| {plan} |" in table for plan in plans)
    assert plot.read_text().startswith("<svg")


def test_plan_names():
    assert plan_named("none").steps == ()
    assert plan_named("illava-small", clip=True) != plan_named("illava-small")
    assert plan_named("illava-small:released").layout == "released"
    for method in METHODS:
        assert plan_named(f"{method}@0.5").layers("vision_block") == (2, 3, 4, 5)
    with pytest.raises(SystemExit, match="no plan named 'nonsense'"):
        plan_named("nonsense")


def test_demo_clips_are_real_files_with_their_truth(tmp_path: Path):
    import av

    rows = render(tmp_path, 2, 0)
    assert [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()] == rows
    for row in rows:
        assert row["reference"].endswith(".")
        with av.open(str(tmp_path / row["uri"])) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert sum(1 for _ in container.decode(video=0)) == 60

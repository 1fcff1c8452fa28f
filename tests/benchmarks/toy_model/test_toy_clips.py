# ruff: noqa: E402
"""Rendered clips and their manifests: real h264, true answers, rows that the pipeline takes; the demo's report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.toy_model.data.mnist_scenes import make_mnist_scene
from benchmarks.toy_model.data.render_clips import render
from docs.generators.screens import DEMO_SCREEN


def test_clips_are_real_files_with_captions_and_questions(tmp_path: Path):
    num_questions = render(tmp_path, 8, 0, kinds=("motion", "order"), num_questions=3)
    captions, questions = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("manifest.jsonl", "questions.jsonl")
    )
    assert num_questions == len(questions) == len({(row["uri"], row["question"]) for row in questions}) == 32
    assert {row["category"] for row in questions} >= {"caption", "direction", "order"}
    for row in captions:
        assert row["reference"].endswith(".")
        with av.open(str(tmp_path / row["uri"])) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert sum(1 for _ in container.decode(video=0)) == 60
    for row in questions:
        if "options" in row:
            assert row["reference"] in "ABCD"[: len(row["options"])]
        assert (row.get("metric") == "yes_no") == (row["reference"] in ("yes", "no"))


def test_the_shipped_questions_are_those_of_the_shipped_captions():
    folder = ROOT / "configs" / "demo" / "clips"
    captions, questions = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("manifest.jsonl", "questions.jsonl")
    )
    told = {row["uri"]: row["reference"] for row in questions if row["category"] == "caption"}
    assert told == {row["uri"]: row["reference"] for row in captions}


def masked(line: str) -> str:
    """A line of the demo's screen without what may differ between two machines."""
    if line.startswith(("  whole ", "  merged ")):
        return line.split(maxsplit=1)[0]
    line = re.sub(r"\d+/(\d+)", r"N/\1", line)
    return re.sub(r"[\d.]+ s of the model's device", "N s of the model's device", line).partition(
        "as fewer tokens save"
    )[0]


@pytest.mark.long
def test_the_demo_tells_the_truth_and_recomputes_nothing(tmp_path: Path):
    command = [sys.executable, "jobs/demo.py", "--set", f"output.uri={tmp_path}/merged", "--seconds", "0"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert first.returncode == 0, first.stderr
    figures = {line.split()[0]: line for line in first.stdout.splitlines() if line.startswith(("whole ", "merged "))}
    assert figures.keys() == {"whole", "merged"}
    assert "kept 100.0%" in figures["whole"]
    assert "kept 26.7%" in figures["merged"]
    assert "time       this model is too small to gain time" in first.stdout
    assert f"next       illava compare {tmp_path}/whole {tmp_path}/merged\n" in first.stdout
    for line in figures.values():
        assert " failed" not in line
        right, total = line.split("captions ")[1].split(",")[0].split("/")
        assert int(right) >= int(total) // 2
    # docs/screens.md shows this: the answers of a near-tie, seconds and the measured layers aside
    shown = [line for line in DEMO_SCREEN.read_text("utf-8").splitlines() if line[:11].strip()]
    printed = [line for line in first.stdout.replace(str(tmp_path), "runs/demo").splitlines() if line[:11].strip()]
    assert [masked(line) for line in printed] == [masked(line) for line in shown]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert again.stdout == first.stdout
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}


def test_digits_stand_where_the_answers_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "src" / "digits"
    folder.mkdir(parents=True)
    block = np.zeros((28, 28))
    block[4:24, 4:24] = 1.0
    for digit in range(10):
        (folder / f"{digit}.json").write_text(json.dumps({"data": block.ravel().tolist()}))
    monkeypatch.setenv("MNIST_FOLDER", str(tmp_path))
    sample = make_mnist_scene(3)
    places = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
    question = next(q for q in sample.questions if q.task == "mnist_digit")
    cell = places.index(question.text.removeprefix("What digit is at the ").removesuffix("?"))
    row, col = divmod(cell, 3)
    grey = sample.frames[0].min(-1)
    inside = grey[round((row + 0.5) * 112 / 3) - 8 :, round((col + 0.5) * 112 / 3) - 8 :][:16, :16]
    assert inside.mean() > 180
    assert np.array_equal(sample.frames, make_mnist_scene(3).frames)

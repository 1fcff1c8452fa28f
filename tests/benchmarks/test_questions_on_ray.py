"""Questions about clips of the demo's generator through Ray with the bundled model: score, interval, cost, compare."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.toy_model.data.render_clips import render
from pipeline.evaluation.compare import compare_runs
from pipeline.evaluation.run_scores import score_run
from tests.support.runs.fakes import read_rows, violations

ROOT = Path(__file__).resolve().parents[2]


def answer(clips: Path, output: Path, *more: str) -> subprocess.CompletedProcess:
    sets = {"input.uri": f"{clips}/", "input.manifest": clips / "questions.jsonl", "output.uri": output}
    command = [sys.executable, "jobs/answer_questions.py", "--config", "configs/demo_questions.yaml"]
    command += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_questions_on_generated_clips_are_scored_priced_and_compared(tmp_path):
    clips, merged, whole = tmp_path / "clips", tmp_path / "merged", tmp_path / "whole"
    assert render(clips, 6, 500, kinds=("motion", "order")) == 24
    done = answer(clips, merged)
    assert done.returncode == 0, done.stderr
    assert "24 questions on 6 media" in done.stdout
    assert answer(clips, whole, "--set", "reduction={preset: none}").returncode == 0
    for output in (merged, whole):
        assert violations(output) == []
        rows = read_rows(output)
        # Eight items a shard, four questions a clip: each clip is read for its first question and for no other.
        assert [row["load_s"] > 0 for row in rows] == [n % 4 == 0 for n in range(24)]
        assert all(row["cost_usd"] > 0 for row in rows)
        interval = score_run(str(output)).groups[0].interval
        assert interval.num_clusters == 6
        assert 0 <= interval.low <= interval.mean <= interval.high <= 1
        record = json.loads((output / "_RUN.json").read_text())
        assert record["totals"]["sums"]["cost_usd"] == pytest.approx(sum(row["cost_usd"] for row in rows))
    comparison = compare_runs(str(whole), str(merged))
    assert comparison.mcnemar is not None
    kept = [sum(row["num_decoder_tokens_kept"] for row in read_rows(output)) for output in (whole, merged)]
    assert kept[1] < 0.5 * kept[0]

"""Runs the installed lmms-eval itself with model `illava` on a local task, and holds its answers to a job's own rows.

    pip install -e ".[lmms-eval]" && pip install --no-deps lmms-eval==0.7.3
    python benchmarks/accuracy/lmms_eval_check.py --folder FOLDER [--count 6] [--json
    benchmarks/results/lmms_eval_check.json]

The task: questions of configs/demo/clips, answered by the bundled model. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
CONFIG, CLIPS = ROOT / "configs" / "demo_questions.yaml", ROOT / "configs" / "demo" / "clips"
_TASK = """\
task: illava_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function local_task.visuals
doc_to_text: !function local_task.text
doc_to_target: reference
generation_kwargs: {{max_new_tokens: 32, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}
"""
_FUNCTIONS = """\
def visuals(doc):
    return [doc["uri"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


def write_task(folder: Path, count: int) -> Path:
    """The task's three files; the path of its questions, which are a manifest too."""
    lines = [json.loads(line) for line in (CLIPS / "questions.jsonl").read_text().splitlines()[:count]]
    rows = [
        {"uri": str(CLIPS / line["uri"]), "question": line["question"], "reference": line["reference"]}
        for line in lines
    ]
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "illava_local.yaml").write_text(_TASK.format(questions=questions))
    (folder / "local_task.py").write_text(_FUNCTIONS)
    return questions


def harness_answers(folder: Path) -> list[str]:
    command = [sys.executable, "-m", "lmms_eval", "--model", "illava", "--model_args", f"config={CONFIG}"]
    command += ["--tasks", "illava_local", "--include_path", str(folder), "--output_path", str(folder / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run([*command, "--log_samples"], cwd=ROOT, env=os.environ | offline, check=True)
    [samples] = (folder / "out").rglob("*_samples_illava_local.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    # A list of one answer, or the answer itself, as the harness's filter left it.
    return [found if isinstance(found, str) else found[0] for found in (row["filtered_resps"] for row in rows)]


def job_answers(folder: Path, questions: Path) -> list[str]:
    sets = {"input.manifest": questions, "input.uri": CLIPS, "output.uri": folder / "job", "runtime.executor": "local"}
    command = [sys.executable, "jobs/answer_questions.py", "--config", str(CONFIG)]
    command += [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    subprocess.run(command, cwd=ROOT, check=True)
    return [
        text for part in sorted((folder / "job" / "data").glob("*")) for text in pq.read_table(part)["text"].to_pylist()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="empty; where task and answers go")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--json", type=Path, help="where the answers side by side are written")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    questions = write_task(folder, options.count)
    texts = [json.loads(line)["question"] for line in questions.read_text().splitlines()]
    rows = zip(texts, harness_answers(folder), job_answers(folder, questions), strict=True)
    answers = [dict(zip(("question", "harness", "job"), row, strict=True)) for row in rows]
    num_same = sum(row["harness"] == row["job"] for row in answers)
    for row in answers:
        print("same" if row["harness"] == row["job"] else "DIFFERS", row)
    if options.json:
        counts = {"num_questions": len(answers), "num_same": num_same}
        found = {"benchmark": "lmms_eval_check", "lmms_eval": version("lmms-eval"), **counts, "answers": answers}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(num_same < len(answers))


if __name__ == "__main__":
    sys.exit(main())

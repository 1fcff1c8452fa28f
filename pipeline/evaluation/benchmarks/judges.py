"""Writes a run's answers into the file that a benchmark's own judge reads. Calls no judge.

Every row of a run is in the file; one that failed has an empty answer, which the judge will score as wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.errors import InputError
from pipeline.evaluation.run_columns import read_run_columns
from pipeline.storage import storage

Row = Mapping[str, Any]  # question_id, prompt, text, reference, fields of a result row


def judge_file(benchmark: str, rows: Sequence[Row]) -> Any:
    """Build what the judge of a benchmark reads, as JSON types.

    Args:
        benchmark: its name in `pipeline.evaluation.benchmarks.registry.BENCHMARKS`.
        rows: of a run over that benchmark's manifest, in manifest order.

    Raises:
        InputError: no judge is known for it, or the rows are of another benchmark.
    """
    if benchmark not in JUDGES:
        raise InputError(f"no judge's format is known for {benchmark!r}; there are: {', '.join(JUDGES)}")
    own = [row for row in rows if row["fields"].get("benchmark") == benchmark]
    if not own:
        raise InputError(
            f"the run has no row of benchmark {benchmark!r}; its manifest must come from `python -m pipeline convert`"
        )
    return JUDGES[benchmark](own)


def export_for_judge(run_uri: str, benchmark: str, output_uri: str) -> int:
    """Write the file a judge reads; returns how many entries it has.

    Raises:
        InputError: as `judge_file`.
        RefusedError: no run, or one that is not finished.
    """
    names = ("question_id", "prompt", "text", "reference", "fields")
    columns = read_run_columns(run_uri, names).columns
    rows = [dict(zip(names, values, strict=True)) for values in zip(*(columns[name] for name in names), strict=True)]
    content = judge_file(benchmark, rows)
    storage.write_atomic(output_uri, json.dumps(content, ensure_ascii=False, indent=1).encode())
    return len(content)


def _mmvet(rows: Sequence[Row]) -> dict[str, str]:
    """``{"v1_0": "text"}``; the file ``results/MODEL.json`` of ``mm-vet_evaluator.py --model MODEL``.

    Source: github.com/yuweihao/MM-Vet@7d717c2 ``mm-vet_evaluator.py`` (``results[id]``).
    """
    return {row["question_id"]: row["text"] for row in rows}


def _question_answer(rows: Sequence[Row]) -> list[dict[str, str]]:
    """``[{"video_name", "Q", "A", "pred"}]``; ``--pred_path`` of correctness, detail, context, temporal, ActivityNet.

    Source: github.com/mbzuai-oryx/Video-ChatGPT@69ea1db ``quantitative_evaluation/evaluate_benchmark_{1,2,3,4}*.py``,
        ``evaluate_activitynet_qa.py``.
    """
    return [
        {
            "video_name": row["fields"]["source_video_name"],
            "Q": row["fields"].get("source_question", row["prompt"]),
            "A": row["reference"],
            "pred": row["text"],
        }
        for row in rows
    ]


def _consistency(rows: Sequence[Row]) -> list[dict[str, str]]:
    """``[{"video_name", "Q1", "Q2", "A", "pred1", "pred2"}]``: the two wordings of a video's question together.

    The n-th first wording of a video belongs to its n-th second one.

    Source: the same repository, ``evaluate_benchmark_5_consistency.py``; pairing as lmms-eval 0.7.3
        ``lmms_eval/tasks/videochatgpt/utils.py`` ``videochatgpt_aggregate_submissions_consistency``.
    """
    wordings: dict[str, tuple[list[Row], list[Row]]] = {}
    for row in rows:
        first, second = wordings.setdefault(row["fields"]["source_video_name"], ([], []))
        (second if row["fields"].get("source_question_1", "None") == "None" else first).append(row)
    pairs = []
    for video_name, (first, second) in wordings.items():
        if len(first) != len(second):
            raise InputError(
                f"video {video_name}: {len(first)} questions in the first wording, {len(second)} in the second; the "
                "run must hold the whole consistency set"
            )
        pairs += [
            {
                "video_name": video_name,
                "Q1": one["prompt"],
                "Q2": other["prompt"],
                "A": one["reference"],
                "pred1": one["text"],
                "pred2": other["text"],
            }
            for one, other in zip(first, second, strict=True)
        ]
    return pairs


def _described(rows: Sequence[Row]) -> list[dict[str, str]]:
    """``[{"video_name", "question", "answer", "pred"}]``.

    Source: lmms-eval 0.7.3 ``lmms_eval/tasks/video_detail_description/utils.py`` ``gpt_eval``, which is the judge of
        this set; it has no script of its own.
    """
    return [
        {
            "video_name": row["fields"]["source_video_name"],
            "question": row["fields"].get("source_question", row["prompt"]),
            "answer": row["reference"],
            "pred": row["text"],
        }
        for row in rows
    ]


JUDGES: Mapping[str, Callable[[Sequence[Row]], Any]] = {
    "mmvet": _mmvet,
    "videochatgpt": _question_answer,
    "videochatgpt_consistency": _consistency,
    "activitynetqa": _question_answer,
    "videodc": _described,
}

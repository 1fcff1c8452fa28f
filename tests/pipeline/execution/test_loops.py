"""Loops, stop texts and probabilities in a job's rows: tried again, counted, told of. Takes 8 s.

Answers that loop come from a model that is told what to say, or is made to by rewards for what it said before.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from docs.generators.configuration import EXAMPLES
from illava.requests import Generation
from pipeline.config.load import parse_config
from pipeline.errors import ConfigError
from pipeline.execution.ray.metrics import RowMetrics
from pipeline.execution.reporting.summary import RunStats, RunSummary, render_summary
from pipeline.execution.rows import RunInfo
from pipeline.execution.runner import run_job
from pipeline.execution.worker import VLMWorker
from pipeline.inspection.status import run_status
from pipeline.records import MediaItem
from pipeline.report.write import write_report
from pipeline.sweep.config import SweepConfig
from pipeline.tasks.build import build_task
from pipeline.tasks.sampling import after_a_loop, sampling_params
from tests.support.models.families import make_folder
from tests.support.runs.fakes import FakeLoader, FakeVLM, job_config, read_rows, violations


class LoopingVLM(FakeVLM):
    """Answers in a loop so often, and then as ever; remembers what it was asked."""

    def __init__(self, *, loops: int) -> None:
        super().__init__()
        self._loops, self.asked = loops, []

    def submit(self, request, *, plan=None) -> None:
        self.asked.append(request)
        super().submit(request, plan=plan)

    def step(self) -> list[Generation]:
        [answer] = super().step()
        self._loops -= 1
        return [replace(answer, text="and " * 9, finish_reason="loop") if self._loops >= 0 else answer]


def rows_of(tmp_path, vlm, *, numbers=(7,), **sampling):
    subject = VLMWorker(job_config(tmp_path / "out", {"uri": "x/"}, sampling=sampling), RunInfo("a", "b"), vlm=vlm)
    for number in numbers:
        item = MediaItem(f"item-{number}", (f"{number}.mp4",), "video", (1,), ("",))
        subject.add(FakeLoader().load(item), attempts=1, shard_index=0)
    rows = {}
    while subject.pending:
        rows |= {outcome.row.item_id: outcome.row for outcome in subject.step()}
    return rows


@pytest.mark.parametrize(
    ("loops", "reason", "text", "tries"),
    [(0, "stop", "7", 1), (1, "stop", "7", 2), (2, "loop", "and " * 9, 2)],
    ids=["no loop", "a loop, then none", "two loops"],
)
def test_an_answer_that_loops_is_tried_once_more_and_both_tries_count(tmp_path, loops, reason, text, tries) -> None:
    vlm = LoopingVLM(loops=loops)
    row = rows_of(tmp_path, vlm, on_loop="retry")["item-7"]
    assert (row.status, row.finish_reason, row.text, row.attempts) == ("ok", reason, text, tries)
    assert (row.num_generated_tokens, row.num_vision_tokens, row.num_frames) == (5 * tries, 98 * tries, 2)
    assert row.kept_ratio == pytest.approx(50 / 98)
    assert len(vlm.asked) == tries
    assert {request.sampling.temperature for request in vlm.asked[1:]} <= {0.2}
    assert len({request.sampling.seed for request in vlm.asked}) == tries
    assert {request.content[-1] for request in vlm.asked} == {"Describe the video in two sentences."}


def test_without_retry_a_loop_is_a_row(tmp_path) -> None:
    vlm = LoopingVLM(loops=1)
    rows = rows_of(tmp_path, vlm, numbers=(7, 11), on_loop="cut")
    assert [(row.finish_reason, row.attempts) for row in rows.values()] == [("loop", 1), ("stop", 1)]
    assert [request.sampling.on_loop for request in vlm.asked] == ["cut"] * 2


def test_the_second_try_is_the_same_one_everywhere() -> None:
    sampling = parse_config(
        {"input": {"uri": "a"}, "model": {"model_id": "b"}, "output": {"uri": "c"}}, source="x"
    ).sampling
    greedy, hot = (sampling_params(sampling.model_copy(update={"temperature": t}), seed=3) for t in (0.0, 0.9))
    assert (after_a_loop(greedy).temperature, after_a_loop(hot).temperature) == (0.2, 0.9)
    assert after_a_loop(greedy).seed == after_a_loop(hot).seed == 400428752577443418


def test_loops_are_counted_in_summary_and_metrics(tmp_path) -> None:
    rows = rows_of(tmp_path, LoopingVLM(loops=1), numbers=(7, 11)).values()
    stats, counted = RunStats(), {}

    class Counter:
        def __init__(self, name) -> None:
            self._name = name

        def inc(self, value, tags) -> None:
            counted[self._name] = counted.get(self._name, 0) + value

        def observe(self, value, tags) -> None: ...

    class Cluster:
        def metric(self, kind, name, description, **options):
            return Counter(name)

    metrics = RowMetrics(Cluster(), job="x")
    for row in rows:
        stats.add(row)
        metrics.add(row)
    assert stats.num_loops == counted["illava_loops"] == 1
    summary = RunSummary(0, "x", "out", 2, 0, stats, 1.0, None)
    assert "  loops          1 answers repeat themselves" in render_summary(summary)
    assert "loops" not in render_summary(replace(summary, stats=RunStats()))


@pytest.fixture(scope="module", params=["llava_onevision", "qwen2_5_vl"])
def model(request, tmp_path_factory) -> Path:
    return make_folder(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    pixels = np.random.default_rng(4).integers(0, 256, (3, 56, 84, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


def test_every_key_of_the_documented_example_reaches_the_rows_of_a_run(tmp_path, model, pictures) -> None:
    sampling = yaml.safe_load(EXAMPLES["sampling"])["sampling"] | {"grammar": {"regex": "[ab]{9,}"}}
    # Rewards instead of penalties: the answers loop, as often as they are asked.
    sampling |= {"max_new_tokens": 24, "loop_tokens": 12, "presence_penalty": -2.0, "frequency_penalty": -2.0}
    sampling |= {"repetition_penalty": 0.5, "min_p": 0.9}
    config = job_config(
        tmp_path / "out",
        {"uri": str(pictures)},
        model={"model_id": str(model), "dtype": "float32", "kv_cache_bytes": 8 << 20},
        sampling=sampling,
    )
    summary = run_job(config)
    rows = read_rows(tmp_path / "out")
    assert {(row["status"], row["finish_reason"], row["attempts"]) for row in rows} == {("ok", "loop", 2)}
    assert all(24 <= row["num_generated_tokens"] <= 48 for row in rows)
    assert all(-20 < row["answer_logprob"] <= 0 for row in rows)
    assert violations(tmp_path / "out") == []
    assert summary.stats.num_loops == 3
    assert json.loads((tmp_path / "out" / "_RUN.json").read_text())["totals"]["by_finish_reason"] == {"loop": 3}
    assert run_status(str(tmp_path / "out")).totals.by_finish_reason == {"loop": 3}
    assert "3 answers repeat themselves" in Path(write_report(str(tmp_path / "out"))).read_text()


def test_questions_have_the_probability_of_each_option(tmp_path, model, pictures) -> None:
    asked = [
        {"question": "Which?", "options": ["red", "blue", "green"], "reference": "A"},
        {"question": "Is it?", "reference": "yes", "metric": "yes_no"},
        {"question": "What?", "reference": "it"},
    ]
    lines = [json.dumps({"uri": f"{pictures}/{n}.png", **line}) for n, line in enumerate(asked)]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    config = job_config(
        tmp_path / "out",
        {"manifest": str(tmp_path / "asked.jsonl")},
        model={"model_id": str(model), "dtype": "float32", "kv_cache_bytes": 8 << 20},
        task={"kind": "question"},
        sampling={"max_new_tokens": 3, "logprobs": True},
    )
    run_job(config)
    choice, yes_no, opened = read_rows(tmp_path / "out")
    assert [len(row["option_probabilities"]) for row in (choice, yes_no)] == [3, 2]
    assert all(0 < one < 1 for row in (choice, yes_no) for one in row["option_probabilities"])
    assert sum(choice["option_probabilities"]) < 1
    assert opened["option_probabilities"] is None
    assert all(row["answer_logprob"] < 0 for row in (choice, yes_no, opened))
    assert violations(tmp_path / "out") == []


def test_options_are_named_as_answers_name_them() -> None:
    config = job_config("out", {"uri": "x/"}, task={"kind": "question"})
    task, item = build_task(config.task), MediaItem("a", ("a.png",), "image", (1,), ("",), prompt="Which?")
    assert task.choices(replace(item, options=("x", "y"))) == (("A", " A", "(A"), ("B", " B", "(B"))
    for metric in ("yes_no", "mme"):
        assert [texts[0] for texts in task.choices(replace(item, fields={"metric": metric}))] == ["yes", "no"]
    assert task.choices(item) == ()


def test_what_makes_no_sense_is_refused_in_words(tmp_path) -> None:
    base = {"input": {"uri": "a"}, "model": {"model_id": "b"}, "output": {"uri": "c"}}
    for sampling, message in (
        ({"on_loop": "cut", "loop_tokens": None}, "loop_tokens null looks for no loops"),
        ({"loop_tokens": 7}, "sampling.loop_tokens"),
        ({"stop": [""]}, "sampling.stop"),
        ({"top_k": 0}, "sampling.top_k"),
        ({"repetition_penalty": 0}, "sampling.repetition_penalty"),
        ({"presence_penalty": 2.5}, "sampling.presence_penalty"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(base | {"sampling": sampling}, source="x")
    sweep = {"input": base["input"], "output": {"uri": "c"}, "models": {"m": base["model"]}, "tables": {"t": []}}
    for sampling in ({"on_loop": "retry"}, {"logprobs": True}):
        with pytest.raises(ValueError, match="are a job's"):
            SweepConfig.model_validate(sweep | {"sampling": sampling})

"""Second passes and candidates of a job: list columns, counts, tries, one load, one encoding. Takes 8 s."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from docs.generators.configuration import EXAMPLES
from illava.families.base import Family
from illava.requests import Generation
from pipeline.config.load import parse_config
from pipeline.errors import ConfigError
from pipeline.execution.rows import RunInfo
from pipeline.execution.runner import run_job
from pipeline.execution.worker import VLMWorker
from pipeline.inspection.verify_rows import stages_fit_latency
from pipeline.loading.loader import Loader
from pipeline.records import MediaItem
from pipeline.runs.run import plan_run
from pipeline.sweep.config import SweepConfig
from tests.support.closeness import no_near_ties
from tests.support.models.families import make_folder
from tests.support.runs.fakes import FakeLoader, FakeVLM, job_config, read_rows, violations
from tests.support.timing import holds_in_one_of_three

EXAMPLE = yaml.safe_load(EXAMPLES["task: {kind: caption}"].split("---\n")[1])
REFINE = {"prompt": "What?", "refine": {"prompt": "Is that so?"}}


@pytest.fixture(scope="module", params=["llava_onevision", "qwen2_5_vl"])
def model(request, tmp_path_factory) -> Path:
    return make_folder(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture
def pictures(tmp_path) -> dict:
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(np.random.default_rng(4).integers(0, 256, (3, 56, 84, 3), dtype=np.uint8)):
        Image.fromarray(picture).save(tmp_path / "in" / f"{number}.png")
    return {"uri": str(tmp_path / "in")}


@pytest.fixture
def named_pictures(tmp_path, pictures) -> dict:
    """The same under names of their own: by its address each would draw other numbers in every folder."""
    lines = [json.dumps({"id": f"picture-{number}", "uri": f"{number}.png"}) for number in range(3)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    return pictures | {"manifest": str(tmp_path / "items.jsonl")}


@pytest.fixture
def clear_choices():
    """Texts of batches of several sizes are compared: no near-tie may decide one."""
    with no_near_ties():
        yield


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """Media that were loaded, and media that a tower was given."""
    counts: Counter = Counter()
    encode, load = Family.encode, Loader.load

    def encoding(self, media, plan, **options):
        counts["encoded"] += len(media)
        return encode(self, media, plan, **options)

    def loading(self, item):
        counts["loaded"] += 1
        return load(self, item)

    monkeypatch.setattr(Family, "encode", encoding)
    monkeypatch.setattr(Loader, "load", loading)
    return counts


def job(out: Path, source: dict, model: Path, **sections):
    sections = {"sampling": {"max_new_tokens": 6}, **sections}
    return job_config(
        out, source, model={"model_id": str(model), "dtype": "float32", "kv_cache_bytes": 8 << 20}, **sections
    )


def test_a_second_pass_loads_and_encodes_nothing_again(tmp_path, model, pictures, counted, clear_choices) -> None:
    run_job(job(tmp_path / "once", pictures, model, task={"prompt": "What?"}))
    assert counted == {"loaded": 3, "encoded": 3}
    counted.clear()
    config = job(tmp_path / "twice", pictures, model, task=REFINE)
    run_job(config)
    assert counted == {"loaded": 3, "encoded": 3}
    once, twice = (read_rows(tmp_path / name) for name in ("once", "twice"))
    assert [row["drafts"] for row in twice] == [[row["text"]] for row in once]
    assert all(row["drafts"] is None and row["candidates"] is None for row in once)
    assert all(row["text"] != row["drafts"][0] for row in twice)
    for before, after in zip(once, twice, strict=True):
        same = ("num_patches", "num_vision_tokens", "num_vision_tokens_kept", "attempts", "kept_ratio", "prompt")
        assert [after[name] for name in same] == [before[name] for name in same]
        assert after["num_prompt_tokens"] > 2 * before["num_prompt_tokens"]
        assert before["num_generated_tokens"] < after["num_generated_tokens"] <= 12
        assert after["gpu_s"] > 0
    assert violations(tmp_path / "twice") == []
    assert plan_run(config).resumed


def test_the_documented_candidates_are_drawn_of_one_encoding(
    tmp_path, model, named_pictures, counted, clear_choices
) -> None:
    sampling = {"max_new_tokens": 4, **EXAMPLE["sampling"]}
    task = {name: value for name, value in EXAMPLE["task"].items() if name != "candidates"}
    run_job(job(tmp_path / "one", named_pictures, model, task=task, sampling=sampling))
    counted.clear()
    run_job(job(tmp_path / "several", named_pictures, model, task=EXAMPLE["task"], sampling=sampling))
    assert counted == {"loaded": 3, "encoded": 3}
    one, several = (read_rows(tmp_path / name) for name in ("one", "several"))
    assert [row["text"] for row in several] == [row["text"] for row in one]
    assert all(len(row["candidates"]) == 3 and row["candidates"][0] == row["text"] for row in several)
    assert any(len(set(row["candidates"])) > 1 for row in several)
    for before, after in zip(one, several, strict=True):
        assert after["num_patches"] == before["num_patches"]
        assert after["num_prompt_tokens"] == 3 * before["num_prompt_tokens"]
        assert after["attempts"] == 1
    assert violations(tmp_path / "several") == []
    again = tmp_path / "again"
    run_job(job(again, named_pictures, model, task=EXAMPLE["task"], sampling=sampling))
    assert [row["candidates"] for row in read_rows(again)] == [row["candidates"] for row in several]


@pytest.mark.parametrize(
    "task", [{"candidates": 2}, {"refine": {"prompt": "Sure?"}}], ids=["candidates", "second pass"]
)
def test_of_a_document_each_window_has_its_own_and_the_row_joins_them(tmp_path, model, pictures, task) -> None:
    first = Image.open(tmp_path / "in" / "0.png")
    first.save(tmp_path / "in" / "pages.tiff", save_all=True, append_images=[Image.open(tmp_path / "in" / "1.png")])
    source = {**pictures, "pattern": "*.tiff"}
    sampling = {"max_new_tokens": 4, "temperature": 0.8}
    run_job(job(tmp_path / "out", source, model, task={"kind": "document", **task}, sampling=sampling))
    [row] = read_rows(tmp_path / "out")
    assert "\n\n".join(page["text"] for page in row["pages"]) == row["text"]
    if "candidates" in task:
        assert len(row["candidates"]) == 2
        assert row["candidates"][0] == row["text"]
        assert row["drafts"] is None
    else:
        assert len(row["drafts"]) == 1
        assert "\n\n" in row["drafts"][0]
    assert violations(tmp_path / "out") == []


class Scripted(FakeVLM):
    """Answers a request by what is said of its name and its turn; remembers what it was asked."""

    def __init__(self, said: dict[str, list], **options) -> None:
        super().__init__(**options)
        self.said, self.asked = said, []

    def submit(self, request, *, plan=None) -> None:
        self.asked.append(request)
        super().submit(request, plan=plan)

    def step(self) -> list[Generation]:
        [answer] = super().step()
        left = self.said.get(answer.request_id.partition("\x1f")[2] or "first", [])
        return [replace(answer, **left.pop(0)) if left else answer]


def row_of(tmp_path, vlm, **sections):
    subject = VLMWorker(job_config(tmp_path / "out", {"uri": "x/"}, **sections), RunInfo("a", "b"), vlm=vlm)
    item = MediaItem("item-7", ("7.mp4",), "video", (1,), ("",))
    subject.add(FakeLoader().load(item), attempts=1, shard_index=0)
    rows = []
    while subject.pending:
        rows += [outcome.row for outcome in subject.step()]
    [row] = rows
    return row


LOOP = {"text": "and and", "finish_reason": "loop"}
AT_RANDOM = {"temperature": 0.7, "on_loop": "retry"}


def test_a_candidate_that_loops_is_tried_again_and_the_try_counts(tmp_path) -> None:
    vlm = Scripted({"candidate 2": [LOOP, {"text": "second"}], "candidate 3": [{"text": "third"}]})
    row = row_of(tmp_path, vlm, task={"candidates": 3}, sampling=AT_RANDOM)
    assert (row.status, row.text, row.candidates) == ("ok", "7", ("7", "second", "third"))
    assert row.attempts == 2  # tries after loops, not candidates
    assert len(vlm.asked) == 4
    assert (row.num_generated_tokens, row.num_prompt_tokens) == (4 * 5, 4 * 200)
    assert row.kept_ratio == pytest.approx(50 / 98)
    assert len({request.request_id for request in vlm.asked}) == 3
    assert {request.reduction_id for request in vlm.asked} == {"item-7"}


def test_a_first_answer_that_loops_is_tried_again_before_it_is_refined(tmp_path) -> None:
    vlm = Scripted({"first": [LOOP, {"text": "a draft"}, {"text": "refined"}]})
    row = row_of(tmp_path, vlm, task=REFINE, sampling={"on_loop": "retry"})
    assert (row.text, row.drafts, row.attempts) == ("refined", ("a draft",), 2)
    assert vlm.asked[-1].history[-1].content == ("a draft",)
    assert vlm.asked[-1].content == ("Is that so?",)
    assert row.num_generated_tokens == 3 * 5


@pytest.mark.parametrize(
    ("said", "drafts"),
    [({"first": [{"error": ValueError("no")}]}, None), ({"first": [{}, {"error": ValueError("no")}]}, ("7",))],
    ids=["the first turn", "the second"],
)
def test_a_turn_that_fails_is_a_failed_row(tmp_path, said, drafts) -> None:
    row = row_of(tmp_path, Scripted(said), task=REFINE)
    assert (row.status, row.text, row.drafts, row.candidates) == ("failed", "", drafts, None)


def test_a_candidate_that_fails_is_a_failed_row(tmp_path) -> None:
    vlm = Scripted({"candidate 2": [{"error": ValueError("no")}]})
    row = row_of(tmp_path, vlm, task={"candidates": 2}, sampling={"temperature": 0.7})
    assert (row.status, row.candidates) == ("failed", None)


@pytest.mark.parametrize("task", [{"candidates": 3}, REFINE], ids=["candidates", "second pass"])
def test_the_stages_of_all_passes_sum_to_the_latency(tmp_path, task) -> None:
    def attempt(number: int) -> None:
        vlm = Scripted({}, sleeps={"decode_s": 0.02})
        row = row_of(tmp_path, vlm, task=task, sampling={"temperature": 0.7})
        in_worker = dict.fromkeys(("fetch_s", "load_s", "preprocess_s"), 0.0)  # a worker knows no loading
        assert stages_fit_latency(asdict(row) | in_worker)

    holds_in_one_of_three(attempt)


def test_what_makes_no_sense_is_refused_in_words() -> None:
    base = {"input": {"uri": "a"}, "model": {"model_id": "b"}, "output": {"uri": "c"}}
    for task, words in (
        ({"candidates": 3}, r"task.candidates are all the same at sampling.temperature 0"),
        ({"candidates": 3, **REFINE}, "refine goes on from one answer, and candidates draws several"),
        ({"candidates": 1}, "task"),
        ({"refine": {"prompt": ""}}, "task"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_config(base | {"task": task}, source="x")
    sweep = {"input": base["input"], "output": {"uri": "c"}, "models": {"m": base["model"]}, "tables": {"t": []}}
    with pytest.raises(ValueError, match="leave out refine and candidates"):
        SweepConfig.model_validate({**sweep, "task": REFINE})

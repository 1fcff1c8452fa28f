"""Grammars of a job, from its configuration to its rows; families of tiles and of native resolution. Takes 6 s."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonschema import Draft202012Validator
from PIL import Image

from docs.generators.configuration import ALTERNATIVES
from illava.requests import Grammar
from pipeline.config.load import parse_config
from pipeline.errors import ConfigError
from pipeline.execution.runner import run_job
from pipeline.records import MediaItem
from pipeline.runs.config_fingerprint import resolve_config_fingerprint
from pipeline.runs.run_record import recorded_config, recorded_config_fingerprint
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.measure import build_requests
from pipeline.tasks.build import build_task
from pipeline.tasks.sampling import after_a_loop, sampling_params
from tests.support.models.families import make_folder
from tests.support.runs.fakes import FakeLoader, job_config, read_rows, violations

BASE = {"input": {"uri": "a"}, "model": {"model_id": "b"}, "output": {"uri": "c"}}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["llava_onevision", "qwen2_5_vl"])
def model(request, tmp_path_factory) -> dict:
    folder = make_folder(request.param, tmp_path_factory.mktemp("model"))
    return {"model_id": str(folder), "dtype": "float32", "kv_cache_bytes": 8 << 20}


@pytest.fixture
def pictures(tmp_path) -> Path:
    pixels = np.random.default_rng(4).integers(0, 256, (2, 56, 84, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "in" / f"{number}.png")
    return tmp_path / "in"


def rows_of(tmp_path, model, source, **sections) -> list[dict]:
    run_job(job_config(tmp_path / "out", source, model=model, **sections))
    assert violations(tmp_path / "out") == []
    return read_rows(tmp_path / "out")


def test_the_documented_examples_hold_every_answer(tmp_path, model, pictures) -> None:
    """At random, from weights that would say anything, under a penalty; questions have their own test."""
    by_schema, by_regex, _ = (yaml.safe_load(text)["sampling"] for text in ALTERNATIVES["sampling.grammar"])
    for name, sampling in {"schema": by_schema, "regex": by_regex}.items():
        (tmp_path / name).mkdir()
        drawn = sampling | {"temperature": 1.0, "repetition_penalty": 1.1, "logprobs": True}
        for row in rows_of(tmp_path / name, model, {"uri": str(pictures)}, sampling=drawn):
            assert (row["status"], row["finish_reason"]) == ("ok", "stop")
            assert row["answer_logprob"] <= 0
            if name == "regex":
                assert re.fullmatch(by_regex["grammar"]["regex"], row["text"])
            else:
                Draft202012Validator(by_schema["grammar"]["json_schema"]).validate(json.loads(row["text"]))


def test_an_answer_that_was_cut_is_a_failed_row_with_its_text(tmp_path, model, pictures) -> None:
    sampling = {"grammar": {"regex": "[0-9]{9}"}, "max_new_tokens": 4}
    for row in rows_of(tmp_path, model, {"uri": str(pictures)}, sampling=sampling):
        assert (row["status"], row["error_type"], len(row["text"])) == ("failed", "invalid_answer", 4)
        assert row["error_message"] == "cut at sampling.max_new_tokens; the answer is no whole one of sampling.grammar"


def test_documents_of_a_schema_are_drawn_by_it_unless_told_otherwise(tmp_path, model, pictures) -> None:
    task = {"kind": "document", "output": "json", "json_schema": SCHEMA}
    sections = {"sampling": {"max_new_tokens": 60}, "task": task}
    for row in rows_of(tmp_path, model, {"uri": str(pictures)}, **sections):
        [page] = row["pages"]
        assert json.loads(page["fields"])["kind"] in {"dog", "cat"}
        assert row["status"] == page["status"] == "ok"
    sections["task"] = task | {"enforce_schema": False}
    for row in rows_of(tmp_path / "free", model, {"uri": str(pictures)}, **sections):
        assert (row["status"], row["error_type"]) == ("failed", "invalid_answer")


def test_pages_under_a_grammar_of_the_job_fail_alone_where_they_were_cut(tmp_path, model, pictures) -> None:
    sections = {"sampling": {"max_new_tokens": 3, "grammar": {"regex": "x{4}|y{2}"}}, "task": {"kind": "document"}}
    for row in rows_of(tmp_path, model, {"uri": str(pictures)}, **sections):
        [page] = row["pages"]
        expected = ("ok", None) if page["text"] == "yy" else ("failed", "invalid_answer")
        assert (page["status"], page["error_type"]) == expected


def test_questions_are_answered_by_their_own_options(tmp_path, model, pictures) -> None:
    asked = [
        {"question": "Which?", "options": ["red", "blue", "green"], "reference": "B"},
        {"question": "Is it?", "reference": "no", "metric": "yes_no"},
        {"question": "What?", "reference": "it"},
    ]
    lines = [json.dumps({"uri": f"{pictures}/{n % 2}.png", **line}) for n, line in enumerate(asked)]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    sections = {"task": {"kind": "question"}, "sampling": {"max_new_tokens": 4, "grammar": {"choices": "options"}}}
    choice, yes_no, opened = rows_of(tmp_path, model, {"manifest": str(tmp_path / "asked.jsonl")}, **sections)
    assert choice["text"] in {"A", "B", "C"}
    assert yes_no["text"] in {"yes", "no"}
    assert {choice["score"], yes_no["score"]} <= {0.0, 1.0}
    assert opened["status"] == "ok"
    assert choice["answer"] == choice["text"]


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({}, r"sampling.grammar: give one of .*; got none"),
        ({"regex": "a", "choices": ["a"]}, r"sampling.grammar: give one of .*; got regex and choices"),
        ({"regex": "("}, r"sampling.grammar.regex: unclosed group"),
        ({"regex": ""}, r"sampling.grammar.regex: "),
        ({"choices": []}, r"sampling.grammar.choices: give texts"),
        ({"choices": ["a", ""]}, r"1 problem\n  sampling.grammar.choices.1: "),
        ({"choices": [True]}, r"1 problem\n  sampling.grammar.choices.0: .*put it in quotes"),
        ({"choices": "letters"}, r"sampling.grammar.choices.options: Input should be 'options'"),
        (
            {"choices": "options"},
            r"sampling.grammar.choices: `options` are those of questions.* is caption",
        ),
        ({"json_schema": {"type": "objekt"}}, r"sampling.grammar.json_schema: \$.type: 'objekt'"),
        ({"json_schema": {"$ref": "http://a"}}, r"sampling.grammar.json_schema: reference 'http://a' leads out"),
        (
            {"json_schema": {"properties": {"a": {"items": {"not": {}}}}}},
            r"sampling.grammar.json_schema: \$.properties.a.items: Unimplemented keys: \[\"not\"\]",
        ),
        ({"json_schem": {}}, r"sampling.grammar.json_schem: unknown key; did you mean sampling.grammar.json_schema\?"),
    ],
    ids=str,
)
def test_what_no_answer_can_be_drawn_by_is_refused_with_its_path(grammar, message) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(BASE | {"sampling": {"grammar": grammar}}, source="x.yaml")


def test_a_documents_schema_is_refused_where_it_cannot_be_enforced_and_the_way_out_is_named() -> None:
    task = {"kind": "document", "output": "json", "json_schema": {"properties": {"a": {"uniqueItems": True}}}}
    with pytest.raises(ConfigError, match=r"\$.properties.a: .*uniqueItems.*; enforce_schema: false only checks"):
        parse_config(BASE | {"task": task}, source="x.yaml")
    found = parse_config(BASE | {"task": task | {"enforce_schema": False}}, source="x.yaml")
    assert build_task(found.task).json_schema is None
    task["json_schema"] = SCHEMA
    with pytest.raises(ConfigError, match=r"an answer has one grammar; .* task.enforce_schema: false"):
        parse_config(BASE | {"task": task, "sampling": {"grammar": {"regex": "a"}}}, source="x.yaml")


def test_a_second_try_after_a_loop_has_the_same_grammar() -> None:
    sampling = parse_config(BASE | {"sampling": {"grammar": {"regex": "a+"}}}, source="x").sampling
    first = sampling_params(sampling, seed=3)
    assert after_a_loop(first).grammar == first.grammar == Grammar(regex="a+")


def test_a_sweep_asks_by_the_same_grammar_and_by_each_items_options() -> None:
    sweep = {"input": {"uri": "a"}, "output": {"uri": "c"}, "models": {"m": BASE["model"]}, "tables": {"t": []}}
    for choices in ("options", ["x", "y"]):
        questions = {"task": {"kind": "question"}, "sampling": {"grammar": {"choices": choices}}}
        item = MediaItem("a", ("7.mp4",), "video", (1,), ("",), prompt="Which?", options=("red", "blue"))
        [request] = build_requests(SweepConfig.model_validate(sweep | questions), [FakeLoader().load(item)])
        expected = ("A", "B") if choices == "options" else ("x", "y")
        assert request.sampling.grammar == Grammar(choices=expected)
    with pytest.raises(ValueError, match="`options` are those of questions"):
        SweepConfig.model_validate(sweep | {"sampling": {"grammar": {"choices": "options"}}})


def test_runs_from_before_schemas_were_enforced_mean_what_they_did(tmp_path, model) -> None:
    """The key is refused by its name; where there is no schema, nothing differs."""
    schema = {"kind": "document", "output": "json", "json_schema": {"not": {"type": "string"}}}
    for task, differs in ((schema, True), ({"kind": "document"}, False), ({"kind": "caption"}, False)):
        enforced = dict(task, json_schema=SCHEMA) if differs else task
        now = resolve_config_fingerprint(job_config(tmp_path, {"uri": "a/"}, model=model, task=enforced)).fields
        assert now.get("task.enforce_schema") == (True if differs else None)
        assert ("versions.llguidance" in now) == differs
        recipe = {key: value for key, value in now.items() if not key.startswith(("task.enforce", "versions.llg"))}
        config = job_config(tmp_path, {"uri": "a/"}, model=model, task=enforced).model_dump(mode="json")
        config["task"].pop("enforce_schema", None)
        if differs:
            config["task"]["json_schema"] = recipe["task.json_schema"] = schema["json_schema"]
        record = {"recipe": recipe, "config": config}
        assert recorded_config_fingerprint(record) == recipe
        assert getattr(recorded_config(record, source="run.json").task, "enforce_schema", False) is False

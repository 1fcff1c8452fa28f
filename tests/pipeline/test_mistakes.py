"""A table of a hundred mistakes of a user: each answer says what, where, why and what next, with its exit code.

`tests/support/runs/mistakes.py` provokes them; commands run in this process. About 10 s.
"""

from __future__ import annotations

import re
import socket
import sys
import time
from typing import NamedTuple

import pytest

from docs.generators.cli import EXIT_CODES
from pipeline.__main__ import main
from tests.support.runs.mistakes import MISTAKES, World, make_world
from tests.support.timing import holds_in_one_of_three


class Answer(NamedTuple):
    """What must stand in the answer, in words; and the exit code."""

    exit_code: int
    what: str
    where: str
    why: str
    then: str


HELP = "--help"
KEYS = "job.yaml: 1 problem"
RUN = "name the output.uri of a job"
NO_RUN = "this folder holds no run"
OTHER = "these keys differ"
ELSEWHERE = "Choose a new output.uri"
ANSWERS: dict[str, Answer] = {
    # The command line.
    "no command": Answer(2, "COMMAND", "illava:", "required", "what there is: illava --help"),
    "unknown command": Answer(2, "unknown command", "'captoin'", "unknown", "did you mean caption?"),
    "unknown flag": Answer(2, "unknown argument", "--dry-rnu", "unknown", "did you mean --dry-run?"),
    "no config": Answer(2, "--config", "illava caption:", "required", HELP),
    "limit is no number": Answer(2, "invalid int value", "--limit", "'few'", HELP),
    "limit 0": Answer(2, KEYS, "input.limit", "got 0", "greater than or equal to 1"),
    "log style": Answer(2, "invalid choice: 'yaml'", "--log", "choose from", "'json'"),
    "set without =": Answer(2, "media.num_frames", "--set", "write it", "section.key=value"),
    "set into a value": Answer(2, "there is no 'x'", "--set name.x=1", "not a section", "docs/configuration.md"),
    "estimate of too few": Answer(2, "--estimate 1", "this input", "two of each kind", "at least 4"),
    "budget in bananas": Answer(2, "'3 bananas'", "--budget", "give money", "25USD"),
    "budget without prices": Answer(2, "5USD", "--budget", "no prices are set", "set prices.gpu_hour_usd"),
    "budget of a dry run": Answer(2, "--budget", "--dry-run", "runs no job", "leave them out"),
    "status of what": Answer(2, "RUN_URI", "illava status", "required", HELP),
    "export format": Answer(2, "'xml'", "--format", "invalid choice", "'csv', 'json', 'jsonl', 'md'"),
    "compare with nothing": Answer(2, "RUN_B", "illava compare", "required", HELP),
    "convert unknown benchmark": Answer(2, "'mmbnch'", "benchmark", "no converter", "there are: ai2d, mmbench"),
    "judge unknown benchmark": Answer(2, "'mmvt'", "judge's format", "no judge's format", "there are: mmvet"),
    # The configuration.
    "config missing": Answer(2, "config", "jbo.yaml", "does not exist", "did you mean"),
    "config is a folder": Answer(2, "cannot be read", "/done", "Is a directory", "name a YAML file"),
    "config with tabs": Answer(2, "is not YAML", "a.yaml", "line 2, column 1", "put text in quotes"),
    "config is a list": Answer(2, "expected sections", "a.yaml", "got a list", "configs/demo.yaml"),
    "config is empty": Answer(2, "expected sections", "a.yaml", "got nothing", "configs/demo.yaml"),
    "config is binary": Answer(2, "cannot be read", "a.yaml", "can't decode byte 0xff", "in UTF-8"),
    "config has a key twice": Answer(2, "`name`", "a.yaml, line 2", "stands on line 1 already", "leave one out"),
    "misspelt section": Answer(2, "medai", "a.yaml: 1 problem", "unknown key", "did you mean media?"),
    "misspelt key": Answer(2, "media.num_frame:", KEYS, "unknown key", "did you mean media.num_frames?"),
    "no model": Answer(2, "model", "a.yaml: 1 problem", "missing", "this key is required"),
    "a word for a number": Answer(2, "media.num_frames", KEYS, "got 'many'", "should be a valid integer"),
    "0 frames": Answer(2, "media.num_frames", KEYS, "got 0", "greater than or equal to 1"),
    "a number that is none": Answer(2, "media.load_timeout_s", KEYS, "got nan", "should be a finite number"),
    "unknown task": Answer(2, "task.kind", KEYS, "got 'capton'", "one of 'caption', 'question', 'document'"),
    "unknown reducer": Answer(2, "'tom'", "reduction.steps.0.reducer", "no reducer of kind", "did you mean 'tome'?"),
    "a wrong stage": Answer(2, "'tome'", "reduction.steps.0", "cannot act at stage", "it can at: decoder_layer"),
    "unknown preset": Answer(2, "'ilava-video'", "reduction", "no preset named", "the presets are: illava-2026"),
    "preset and steps": Answer(2, "`preset`", "reduction", "not both", "give either"),
    "two steps at one place": Answer(2, "two reduction steps", "decoder_layer 2", "two", "there can be only one"),
    "json without a schema": Answer(2, "output json", "\n  task:", "needs json_schema", "{} accepts any JSON"),
    "a branch for a revision": Answer(2, "model.revision", KEYS, "got 'main'", "the 40 hex digits of a commit"),
    "device gpu": Answer(2, "model.device", KEYS, "got 'gpu'", "did you mean cuda?"),
    "device cuda:0": Answer(2, "model.device", KEYS, "got 'cuda:0'", "CUDA_VISIBLE_DEVICES"),
    "cuda without a GPU share": Answer(2, "model.device is cuda", KEYS, "gpus_per_actor is 0", "make one of them auto"),
    "max_failed 1.5": Answer(2, "runtime.max_failed", KEYS, "got 1.5", "a count such as 100"),
    "min above max": Answer(2, "runtime.num_vlm_actors", KEYS, "min is 3 and max is 1", "raise max or lower min"),
    "a template without its place": Answer(2, "the template", "task.open_template", "got 'What'", "lacks {question}"),
    # The input.
    "no input": Answer(2, "name what to read", "input:", "name", "`input.uri` (a prefix"),
    "no such folder": Answer(2, "there is no folder", "/nowhere", "no folder", "working directory"),
    "an empty folder": Answer(2, "no objects", "/media", "pattern '**/*'", "check input.uri and input.pattern"),
    "no media in it": Answer(2, "1 .txt", "/media", "a known media extension", "check input.uri and input.pattern"),
    "a pattern that finds nothing": Answer(2, "no objects", "/media", "pattern '*.png'", "check input.uri and input"),
    "no such manifest": Answer(2, "input.manifest", "itms.jsonl", "there is no", "check the address"),
    "an empty manifest": Answer(2, "manifest", "own.jsonl", "has no rows", "write one line for each item"),
    "a broken line": Answer(2, "not JSON", "own.jsonl, line 2", "Unterminated string", "line 1 column 9"),
    "no column uri": Answer(2, "`uri` or `uris`", "own.jsonl", "the columns are: path", "give one column"),
    "ids twice": Answer(2, "the same item id 'a'", "own.jsonl, lines 1, 2", "the same", "must differ"),
    "a path out of the folder": Answer(2, "refused address", "own.jsonl, line 1", "'..' segments", "by its full path"),
    "an http address": Answer(
        2, "refused address", "own.jsonl, line 1", "scheme 'http' is not allowed", "s3://, gs://"
    ),
    "an unknown extension": Answer(2, "unknown media kind", "own.jsonl, line 1", "unknown", "column `media_kind`"),
    "questions of a folder": Answer(2, "task.kind question", "input.manifest", "needs a manifest", "columns `uri` and"),
    "no questions": Answer(2, "no question", "own.jsonl, line 1", "no question", "add a column `question`"),
    "videos as documents": Answer(2, "6 items are videos", "task.kind document", "reads PDFs", "narrow input.pattern"),
    "no earlier run": Answer(2, "holds no run", "input.exclude_runs", "no run.json", "name an earlier output.uri"),
    "links into nowhere": Answer(2, "no folder", "input.follow_links", "there is no folder", "on this machine"),
    # The model.
    "no such model folder": Answer(2, "there is no folder ./modl", "model.model_id", "no folder", "working directory"),
    "a hub id without a revision": Answer(
        2, "'llava-hf/x'", "model.model_id", "no folder here", "needs model.revision"
    ),
    "no config.json": Answer(2, "config.json", "/model", "has no", "give a Hugging Face model folder"),
    "a broken config.json": Answer(2, "is not valid JSON", "config.json", "line 1 column 2", "download it again"),
    "another family": Answer(
        2, "'bert' model", "model_type in", "not supported", "Supported are: internvl, llava_next"
    ),
    "a quantised model": Answer(
        2, "quantised by awq", "quantization_config", "does not compute with", "take the unquant"
    ),
    "an adapter": Answer(2, "an adapter", "adapter_config.json", "would be left out", "in model.adapter.id"),
    "no preprocessor": Answer(2, "preprocessor_config.json", "/model", "not complete", "download it again"),
    "no weights": Answer(2, "has no weights", "/model", "neither model.safetensors", "hf download"),
    "weights broken off": Answer(2, "broken off", "model.safetensors", "bytes are there", "download the model again"),
    "weights are a web page": Answer(2, "no safetensors file", "model.safetensors", "no header", "download the model"),
    "pickled weights only": Answer(2, "pytorch_model.bin", "/model", "only safetensors are", "hf download"),
    "a shard is missing": Answer(2, "lacks 1 of the 2", "/model", "model-00002-of-00002", "hf download"),
    "no tokenizer": Answer(2, "has no tokenizer", "/model", "none of tokenizer.json", "copy the files"),
    "no chat template": Answer(2, "has no chat template", "/model", "neither chat_template.jinja", "copy it from"),
    "a preset of a larger model": Answer(2, "the plan", "vision blocks [12", "runs blocks 0 to 9", "choose `layers`"),
    "a preset with too many merges": Answer(2, "budget", "vision_block 5", "196 patches per tile", "name fewer layers"),
    "a block that is not there": Answer(2, "the plan", "vision blocks [40]", "runs blocks 0 to 9", "choose `layers`"),
    "a layer that is not there": Answer(2, "the plan", "decoder layer 40", "the last is 5", "choose `layers` from 1"),
    "a budget of all tokens": Answer(2, "can merge", "tome", "at most half of 98", "spread the cut over more layers"),
    "released layout": Answer(2, "layout 'released'", "a tile's", "193 of 196 are left", "use layout 'geometric'"),
    "a cache too small for a token": Answer(2, "is 10", "model.kv_cache_bytes", "one token needs", "raise it, or set"),
    "a cache larger than the machine": Answer(
        2, "one model needs", "this machine", "this machine has", "lower model.kv"
    ),
    "no GPU here": Answer(2, "device cuda", "here", "(without CUDA|no CUDA device)", "take the device cpu"),
    "no GPU for an actor": Answer(2, "runtime.gpus_per_actor is 1", "this process", "no CUDA device", "to run on CPU"),
    "no GPU for Ray here": Answer(2, "device cuda", "here", "(without CUDA|no CUDA device)", "take the device cpu"),
    # The output, and runs.
    "another configuration": Answer(4, "holds another run", "max_new_tokens: 128 there, 5 here", OTHER, ELSEWHERE),
    "another shard size": Answer(4, "holds another run", "items_per_shard: 2 there, 3 here", OTHER, ELSEWHERE),
    "another input": Answer(4, "holds another run", "6 items there, 2 here", OTHER, "input.exclude_runs"),
    "output is a file": Answer(2, "output.uri", "/taken", "is a file", "name a folder"),
    "output scheme": Answer(2, "refused address", "ftp://host/x", "scheme 'ftp'", "allowed are s3://"),
    "parts without a run": Answer(4, "3 parts in data/", "/damaged", "no run.json", ELSEWHERE),
    "a damaged run.json": Answer(4, "is not JSON", "run.json", "it was damaged", "Put the file back"),
    "an edited run.json": Answer(4, "was edited", "run.json", "recipe_digest is 0000", "Put the file back as it was"),
    "status of nothing": Answer(4, "holds no run", "/nowhere", "no run.json", "give a job's output.uri"),
    "verify of nothing": Answer(4, "does not exist", "/nowhere/run.json", NO_RUN, RUN),
    "retry of nothing": Answer(4, "does not exist", "/nowhere/run.json", NO_RUN, RUN),
    "report of nothing": Answer(4, "does not exist", "/nowhere/run.json", NO_RUN, RUN),
    "export of nothing": Answer(4, "does not exist", "/nowhere/run.json", NO_RUN, RUN),
    "compare with no run": Answer(4, "does not exist", "/nowhere/run.json", NO_RUN, RUN),
    "retry of an unfinished run": Answer(4, "1 of 3 parts", "/begun", "are missing", "finish the run first"),
    "retry of an unknown type": Answer(2, "corupt_media", "--only", "no error type", "there are unsafe_uri"),
    "retry with another input": Answer(2, "input.limit", "--set", "the run's own items", "leave it out"),
    "retry with another answer": Answer(4, "holds another run", "max_new_tokens: 128 there, 3", OTHER, ELSEWHERE),
    "verify of a run that lacks parts": Answer(4, "1 of 3 parts", "part-00001", "missing_part", "same command again"),
    "a part cut off": Answer(5, "cannot be read", "part-00000.parquet", "file size is 1 bytes", "illava verify"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("mistakes") / "shared")


@pytest.fixture
def world(shared, tmp_path, monkeypatch) -> World:
    """The working directory is the test's own, and no cluster stands anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    return World(shared, tmp_path)


def answer_of(arguments, capsys) -> tuple[int, str]:
    try:
        exit_code = main(arguments)
    except SystemExit as ended:  # argparse's way
        exit_code = ended.code
    said = capsys.readouterr()
    return exit_code, said.out + said.err


def test_the_table_is_whole() -> None:
    assert ANSWERS.keys() == MISTAKES.keys()
    assert len(ANSWERS) >= 100
    assert {str(one.exit_code) for one in ANSWERS.values()} <= EXIT_CODES.keys(), "documented in docs/cli.md"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_answer_says_what_where_why_and_what_next(mistake, world, capsys) -> None:
    if "no GPU" in mistake and has_cuda():
        pytest.skip("this machine has one")
    exit_code, said = answer_of(MISTAKES[mistake](world), capsys)
    expected = ANSWERS[mistake]
    assert exit_code == expected.exit_code, said
    for part in expected[1:]:
        pattern = part if part.startswith("(") and "|" in part else re.escape(part)
        assert re.search(pattern, said, re.IGNORECASE), f"{part!r} is not in: {said}"
    assert "defect" not in said
    assert "Traceback" not in said
    assert not (world.folder / "new").exists(), "a mistake leaves no run behind"


def has_cuda() -> bool:
    from illava.devices import has_cuda

    return has_cuda()


@pytest.mark.parametrize("executor", ["local", "ray"])
@pytest.mark.parametrize("mistake", ["a preset of a larger model", "no tokenizer", "a cache larger than the machine"])
def test_the_run_says_what_its_dry_run_says_and_starts_nothing(mistake, executor, world, capsys) -> None:
    arguments = [*MISTAKES[mistake](world), "--set", f"runtime.executor={executor}"]
    planned = answer_of(arguments, capsys)
    assert answer_of([word for word in arguments if word != "--dry-run"], capsys) == planned
    assert not (world.folder / "new").exists()


def closed_port() -> tuple[socket.socket, str]:
    """A port on which nobody listens while the socket is open."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    return bound, f"127.0.0.1:{bound.getsockname()[1]}"


def test_a_cluster_that_is_not_there_is_told_with_5(world, capsys, monkeypatch) -> None:
    bound, address = closed_port()
    with bound:
        monkeypatch.setenv("RAY_ADDRESS", address)
        exit_code, said = answer_of(world.job("runtime.executor=ray"), capsys)
    assert exit_code == 5, said
    for part in (
        f"cannot reach the Ray cluster at {address}",
        "refused",
        "unset RAY_ADDRESS",
        "runtime.executor=local",
    ):
        assert part in said
    assert not (world.folder / "new").exists()


def test_a_store_that_is_not_there_is_told_with_5(world, capsys, monkeypatch) -> None:
    bound, address = closed_port()
    with bound:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{address}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "eu-west-1",
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("pipeline.storage.storage._RETRY_S", 0.0)
        exit_code, said = answer_of(world.job("input={uri: s3://bucket/videos/}"), capsys)
    assert exit_code == 5, said
    assert "s3://bucket/videos" in said
    assert "defect" not in said


@pytest.mark.parametrize("mistake", ["misspelt key", "a broken line", "no weights", "another configuration"])
def test_an_answer_takes_less_than_five_seconds(mistake, world, capsys) -> None:
    arguments = MISTAKES[mistake](world)

    @holds_in_one_of_three
    def attempt(_number) -> None:
        began_s = time.monotonic()
        answer_of(arguments, capsys)
        assert time.monotonic() - began_s < 5

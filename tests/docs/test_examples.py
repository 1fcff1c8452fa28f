"""Every fenced block of README and docs is run, validated or parsed by what will meet it.

Shell lines are parsed by the commands' own parsers and their configurations loaded; YAML is validated by `JobConfig`;
Python compiles, and runs where `<!-- run: MARK -->` stands above it. All share one run of the quickstart's job. Time:
12 s of one core, benchmarks' parsers included.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generators.errors import ROWS
from docs.generators.parsers import parser_of_module, parser_of_script
from pipeline.config.load import load_as, load_config, parse_config
from pipeline.config.schema import JobConfig, result_fields
from pipeline.errors import ConfigError
from pipeline.execution.runner import run_job
from pipeline.sweep.config import SweepConfig
from tests.support.docs_pages import PAGES, ROOT, Block, blocks, blocks_of, commands_of

LANGUAGES = {"sh", "yaml", "python", "json", "text"}
DOCUMENTS = ROOT / "tests" / "pipeline" / "runs" / "data" / "runs_27c8a0a" / "documents"
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
MINIMAL = {"input": {"uri": "in"}, "model": {"model_id": "model"}, "output": {"uri": "out"}}


def where(block: Block) -> str:
    return block.where


def test_every_block_says_its_language() -> None:
    strange = [
        one.where for page in PAGES for one in blocks_of(page.read_text("utf-8"), page) if one.language not in LANGUAGES
    ]
    assert strange == []
    assert {language: len(blocks(language)) > 0 for language in LANGUAGES} == dict.fromkeys(LANGUAGES, True)


# --- YAML and JSON


@pytest.mark.parametrize("block", blocks("yaml"), ids=where)
def test_yaml_is_a_job_or_a_part_of_one(block) -> None:
    """A block that begins with a file's name is a whole job."""
    data = yaml.safe_load(block.text)
    assert set(data) <= set(JobConfig.model_fields), block.where
    whole = re.match(r"# \S+\.yaml\n", block.text) is not None
    parse_config(data if whole else MINIMAL | data, source=block.where)


@pytest.mark.parametrize("block", blocks("json"), ids=where)
def test_json_lines_are_json(block) -> None:
    assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())


# --- shell


@pytest.fixture(scope="module")
def job_files(tmp_path_factory) -> dict[Path, Path]:
    """Of each page: a folder with the jobs that it says to save."""
    folders = {}
    for page in PAGES:
        folders[page] = tmp_path_factory.mktemp("jobs")
        for block in blocks_of(page.read_text("utf-8"), page):
            named = re.match(r"# (\S+\.yaml)\n", block.text)
            if block.language == "yaml" and named:
                (folders[page] / named[1]).write_text(block.text)
    return folders


parser_of_script, parser_of_module = lru_cache(parser_of_script), lru_cache(parser_of_module)


def check(words: list[str], jobs: Path) -> None:
    """One command: its flags by its own parser, its files by looking.

    Raises:
        AssertionError, SystemExit, ConfigError: it would not begin.
    """
    match words:
        case ["ray", "job", "submit", "--working-dir", ".", "--", *rest]:
            check(rest, jobs)
        case ["illava", *rest]:
            check(["python", "-m", "pipeline", *rest], jobs)
        case ["python", "-m", module, *rest]:
            options = parsed(parser_of_module(module), rest)
            load(options, jobs, SweepConfig if rest[0] == "sweep" else JobConfig)
        case ["python", script, *rest] if script.endswith(".py"):
            options = parser_of_script(script).parse_args(rest)
            if script.startswith("jobs/"):
                load(options, jobs, SweepConfig if "sweep" in script else JobConfig)
        case ["lmms-eval", "--model", "illava", "--model_args", arguments, "--tasks", _]:
            config, *overrides = arguments.removeprefix("config=").split(",")
            load_config(str(ROOT / config), overrides)
        case ["make", target]:
            assert target in TARGETS
        case ["kubectl", *rest]:
            files = [word.rpartition("=")[2] for word in rest if word.endswith(".yaml")]
            assert files
            assert all((ROOT / name).is_file() for name in files)
        case ["pip", "install", *packages]:
            extras = {name for word in packages for few in re.findall(r"^\.\[(.*)\]$", word) for name in few.split(",")}
            assert extras <= EXTRAS
        case ["python3.11", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"] | ["ray", "start", "--head"]:
            pass
        case ["python", "-c", code]:
            compile(code, "-c", "exec")
        case _:
            raise AssertionError(f"no check is known for: {' '.join(words)}")


def parsed(parser: Any, words: list[str]) -> Any:
    """The flags; of those that print something and end, such as ``--list``, nothing."""
    try:
        return parser.parse_args(words)
    except SystemExit as ended:
        if ended.code:
            raise
    return None


def load(options: Any, jobs: Path, schema: type) -> None:
    """The command's configuration, where it has one, with what the command line overrides."""
    if (name := getattr(options, "config", None)) is None:
        return
    path = jobs / name if (jobs / name).is_file() else ROOT / name
    overrides = [*options.overrides, *([] if options.limit is None else [f"input.limit={options.limit}"])]
    load_as(schema, str(path), overrides)


@pytest.mark.parametrize("block", blocks("sh"), ids=where)
def test_shell_lines_would_begin(block, job_files) -> None:
    for words in commands_of(block.text):
        check(words, job_files[block.page])


def test_commands_in_sentences_have_flags_that_exist(tmp_path) -> None:
    """`python jobs/...`, `illava ...` and `python -m pipeline ...` in backticks, with the placeholders RUN and TYPE."""
    for page in PAGES:
        for command in re.findall(r"`((?:illava |python jobs/|python -m pipeline )[^`]*)`", page.read_text("utf-8")):
            words = re.sub(r"^illava ", "python -m pipeline ", command.replace("\\|", "|")).split()
            if len(words) > 2 and "..." not in command and "COMMAND" not in command and "--" in command:
                parser = parser_of_script(words[1]) if words[1] != "-m" else parser_of_module("pipeline")
                parsed(parser, words[2 if words[1] != "-m" else 3 :])


def test_retries_that_errors_names_set_only_what_changes_no_row() -> None:
    """Anything else is refused by `retry`."""
    changing = set(result_fields(JobConfig.model_validate(MINIMAL)))
    told = "".join(words.then for words in ROWS.values())
    sets = [
        key
        for retry in re.findall(r"`((?:python -m pipeline|illava) retry [^`]*)`", told)
        for key in re.findall(r"--set ([\w.]+)=", retry)
    ]
    assert len(sets) > 4
    assert changing.isdisjoint(sets)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("python jobs/caption_videos.py --config configs/demo.yaml --no-such-flag", SystemExit),
        ("python jobs/caption_videos.py --config configs/none.yaml", ConfigError),
        ("python jobs/caption_videos.py --config configs/demo.yaml --set media.frames=3", ConfigError),
        ("python jobs/none.py --config configs/demo.yaml", FileNotFoundError),
        ("python -m pipeline verifies runs/x", SystemExit),
        ("illava verifies runs/x", SystemExit),
        ("illava verify runs/x --sample 3", SystemExit),
        ("illava caption --config configs/demo.yaml --set media.frames=3", ConfigError),
        ("ray job submit --working-dir . -- python jobs/caption_videos.py --plans", SystemExit),
        ("lmms-eval --model illava --model_args config=configs/demo.yaml,media.frames=3 --tasks mme", ConfigError),
        ("pip install -e .[none]", AssertionError),
        ("make nothing", AssertionError),
        ("kubectl apply -f configs/none.yaml", AssertionError),
        ("wget http://x", AssertionError),
    ],
)
def test_a_command_that_would_not_begin_is_seen(line, error, tmp_path) -> None:
    [words] = commands_of(line)
    with pytest.raises(error):
        check(words, tmp_path)


def test_the_words_of_a_shell_block() -> None:
    assert commands_of("a \\\n  b  # c\n. d && e [--f g ...] --only=[h]\n") == [
        ["a", "b"],
        [".", "d"],
        ["e", "--only=[h]"],
    ]


# --- Python


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> str:
    """The quickstart's job as it stands on its page, in this process and with a few tokens a caption."""
    [block] = [one for one in blocks("yaml") if one.mark == "job"]
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "my_job.yaml").write_text(block.text)
    overrides = [
        f"input.uri={ROOT}/configs/demo/clips/",
        f"model.model_id={ROOT}/configs/demo/model",
        f"output.uri={folder}/run",
        "input.limit=2",
        "sampling.max_new_tokens=8",
        "runtime.executor=local",
    ]
    assert run_job(load_config(str(folder / "my_job.yaml"), overrides)).exit_code == 0
    return f"{folder}/run"


@pytest.mark.parametrize("block", blocks("python"), ids=where)
def test_python_compiles_and_runs_where_it_is_marked(block, request, tmp_path, monkeypatch) -> None:
    code = compile(block.text, block.where, "exec", dont_inherit=True)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"__name__": "example"}
    match block.mark:
        case "":
            return
        case "finished-run":
            names["RUN"] = request.getfixturevalue("finished_run")
        case "documents":
            shutil.copytree(DOCUMENTS, tmp_path / "run")
            names |= {"RUN": str(tmp_path / "run"), "OUT": str(tmp_path)}
        case "job-from-python":
            names["OUT"] = str(tmp_path / "run")
        case "reducer" | "task" | "demo-model":
            pass
        case mark:
            raise AssertionError(f"nothing is known of the mark {mark}")
    exec(code, names)
    if block.mark == "reducer":
        _judge_the_reducer(names["LargestNorm"])
    if block.mark == "task":
        assert names["Rating"]().parse(None, "4 of 5").answer == "4"


def _judge_the_reducer(kind: type) -> None:
    import torch

    from illava.reducers.base import Evidence
    from illava.tokens import Tokens

    hidden_TD = torch.tensor([[1.0], [4.0], [2.0], [3.0]])
    place = torch.zeros(4, 3, dtype=torch.long)
    kept = kind(keep_ratio=0.5).assign(Tokens(hidden_TD, (4,), place), Evidence(), "vision_block")
    assert kept.lengths == (2,)

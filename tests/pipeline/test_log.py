"""What is said on stderr: words, colours on a terminal, JSON lines; and nothing is set up without a command.

Time: 12 s of one core, two thirds of it one real run.
"""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.cli import run_cli
from pipeline.errors import PipelineError
from pipeline.execution.reporting.progress import Progress
from pipeline.execution.reporting.summary import RunStats
from pipeline.exit_codes import guarded
from pipeline.log import add_log_fields, asked_style, log_like, log_settings, log_to_stderr

ROOT = Path(__file__).resolve().parents[2]
logger = logging.getLogger("pipeline.test")
foreign = logging.getLogger("foreign.test")


class Terminal(io.StringIO):
    """A stderr that says it is a terminal of 40 columns with colours."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch) -> Terminal:
    """Called by the test itself: pytest puts its own stderr back between a fixture and its test."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def fail(error: Exception):
    def command() -> int:
        raise error

    return command


def say_all() -> int:
    logger.info("seen %d", 1)
    logger.debug("not seen")
    foreign.info("not seen")
    foreign.warning("seen 2")
    warnings.warn("seen 3", stacklevel=1)
    return 0


def test_a_real_run_writes_json_lines_only(tmp_path) -> None:
    """The loading bar of transformers included; results stay on stdout."""
    command = [sys.executable, "-m", "pipeline", "caption", "--config", "configs/demo.yaml", "--limit", "1"]
    command += ["--set", "runtime.executor=local", "--set", "sampling.max_new_tokens=1", "--log", "json"]
    command += ["--set", f"output.uri={tmp_path}/out"]
    began = datetime.now(UTC)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("demo: 1 of 1 items")
    said = lines(done.stderr)
    first = said[0]
    assert {key: first[key] for key in ("level", "logger", "message", "run")} == {
        "level": "info",
        "logger": "pipeline.execution.runner",
        "message": "demo: the model is on cpu, float32",
        "run": f"{tmp_path}/out",
    }
    assert first["time"].endswith("Z")
    assert abs(datetime.fromisoformat(first["time"]) - began) < timedelta(hours=1)
    [session] = [path.stem for path in (tmp_path / "out" / "sessions").iterdir()]
    assert {line["session"] for line in said[1:]} <= {session}


def test_plain_lines_are_words_alone(capsys) -> None:
    """Python's own way with warnings stays."""
    with pytest.warns(UserWarning, match="seen 3"):
        assert guarded(say_all, debug=False) == 0
    assert capsys.readouterr().err == "seen 1\nseen 2\n"
    assert guarded(fail(PipelineError("what, where, next")), debug=False) == 5
    assert capsys.readouterr().err == "error: what, where, next\n"


def test_json_lines_have_level_logger_message_and_each_stands_once(capsys) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert guarded(say_all, debug=False, log="json") == 0
    said = [(line["level"], line["logger"], line["message"]) for line in lines(capsys.readouterr().err)]
    assert said[:2] == [("info", "pipeline.test", "seen 1"), ("warning", "foreign.test", "seen 2")]
    [(level, name, message)] = said[2:]
    assert (level, name) == ("warning", "py.warnings")
    assert "UserWarning: seen 3" in message


@pytest.mark.parametrize("debug", [False, True])
def test_a_json_error_has_its_traceback_in_debug_mode_only(debug, capsys) -> None:
    assert guarded(fail(ZeroDivisionError("a\nb")), debug=debug, log="json") == 5
    [line] = lines(capsys.readouterr().err)
    assert line["level"] == "error"
    assert line["message"].startswith("ZeroDivisionError: a\nb")
    assert ("Traceback" in line.get("traceback", "")) == debug


def test_what_a_library_writes_to_stderr_is_a_line_each(capsys) -> None:
    """A progress bar is its last state; a line begun and never ended is told at the end."""

    def command() -> int:
        print("a library", "speaks", file=sys.stderr)
        sys.stderr.write("\rbar: 1%\rbar: 100%\n\n")
        sys.stderr.write("begun")
        return 0

    before = sys.stderr
    assert guarded(command, debug=False, log="json") == 0
    assert sys.stderr is before
    said = [(line["logger"], line["message"]) for line in lines(capsys.readouterr().err)]
    assert said == [("stderr", "a library speaks"), ("stderr", "bar: 100%"), ("stderr", "begun")]


def test_a_handler_that_a_library_made_meanwhile_writes_to_the_terminal_afterwards(capsys) -> None:
    made = []

    def command() -> int:
        made.append(logging.StreamHandler())
        return 0

    guarded(command, debug=False, log="json")
    made[0].emit(logging.makeLogRecord({"msg": "later"}))
    assert capsys.readouterr().err == "later\n"


def test_a_stderr_that_is_gone_ends_no_command_that_logs_json(monkeypatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    assert guarded(say_all, debug=False, log="json") == 0


@pytest.mark.parametrize("style", ["plain", "json"])
def test_secrets_and_control_characters_are_shown_in_no_style(style, monkeypatch, capsys) -> None:
    """Neither in a traceback, which plain tracebacks of Python would repeat."""
    monkeypatch.setenv("HF_TOKEN", "CANARY-0123456789")
    assert guarded(fail(RuntimeError("CANARY-0123456789 \x1b[2J")), debug=True, log=style) == 5
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "CANARY" not in said
    assert "\x1b" not in said
    assert "\\u001b" not in said


def test_a_terminal_gets_levels_and_colours_and_no_line_is_broken(monkeypatch) -> None:
    """What is longer than the terminal is broken by the terminal alone, so that commands can be copied."""
    terminal = on_terminal(monkeypatch)
    words = f"run: .venv/bin/python jobs/caption_videos.py --config {'x' * 60}.yaml [red]"
    assert guarded(fail(PipelineError(words)), debug=False) == 5
    said = terminal.getvalue()
    assert "\x1b[" in said
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
    assert re.fullmatch(rf"\d\d:\d\d:\d\d ERROR +{re.escape(words)}\n", plain)


class AnyRow:
    """Stands for an answered row; what is counted of it is 0."""

    status, text, error_type, finish_reason, pages = "ok", "", None, "stop", None

    def __getattr__(self, name: str) -> int:
        return 0


def test_a_terminals_line_stands_above_the_bar(monkeypatch) -> None:
    """The bar is wiped before it, and drawn again behind it."""
    terminal = on_terminal(monkeypatch)
    with log_to_stderr():
        progress = Progress(3, RunStats())
        progress.add(AnyRow())
        logger.warning("a line")
        progress.close()
    said = terminal.getvalue()
    assert said.count("1/3") > 1, "the bar is drawn again"
    line = next(line for line in said.split("\n") if "a line" in line)
    assert "1/3" not in line.rpartition("\r")[2]


@pytest.mark.parametrize(("style", "drawn"), [("auto", True), ("plain", True), ("json", False)])
def test_a_terminal_draws_a_bar_unless_json_lines_go_there(style, drawn, monkeypatch) -> None:
    terminal = on_terminal(monkeypatch)
    with log_to_stderr(style):
        progress = Progress(3, RunStats())
        before = terminal.getvalue()
        progress.add(AnyRow())
        progress.close()
    assert "/3" not in before, "a bar that stands still while the model is loaded says nothing"
    assert ("1/3" in terminal.getvalue()) == drawn


def test_without_rich_a_terminal_gets_plain_lines(monkeypatch) -> None:
    """A Python without packages still says which are missing."""
    terminal = on_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    guarded(fail(PipelineError("missing")), debug=False)
    assert terminal.getvalue() == "error: missing\n"


@pytest.mark.parametrize(
    ("arguments", "style"),
    [
        ([], "auto"),
        (["--log", "json"], "json"),
        (["x", "--log=plain", "y"], "plain"),
        (["--lo", "json"], "json"),
        (["--log"], "auto"),
        (["--log", "jsno"], "auto"),
        (["--limit", "json"], "auto"),
    ],
)
def test_the_style_is_known_before_the_command_line_is_parsed(arguments, style) -> None:
    assert asked_style(arguments) == style


@pytest.mark.parametrize(
    "run",
    [
        lambda: main(["verify", "x", "--log", "json", "--dbug"]),
        lambda: main(["verfy", "--log=json"]),
        lambda: main(["caption", "--log", "json"]),
        lambda: run_cli("job", ["--log", "json"]),
    ],
    ids=["flag", "command", "missing", "job"],
)
def test_an_error_of_the_command_line_is_a_json_line_too(run, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    [line] = lines(capsys.readouterr().err)
    assert line["level"] == "error"


def test_a_command_about_a_run_names_it_in_every_line(tmp_path, capsys) -> None:
    assert main(["status", str(tmp_path), "--log", "json"]) == 4
    [line] = lines(capsys.readouterr().err)
    assert line["run"] == str(tmp_path)


def test_after_a_command_logging_is_as_it_was() -> None:
    def state() -> tuple:
        names = ("", "pipeline", "illava", "stderr", "py.warnings")
        return [(logging.getLogger(one).level, list(logging.getLogger(one).handlers)) for one in names], sys.stderr

    before = state()
    for style in ("auto", "plain", "json"):
        guarded(lambda: 0, debug=True, log=style)
        guarded(fail(KeyError("x")), debug=False, log=style)
    assert state()[0] == before[0]
    assert state()[1] is before[1]
    add_log_fields(run="x")  # of a library's user: nothing was set up, so nothing is kept
    assert log_settings() is None


def test_importing_and_using_the_packages_sets_nothing_up() -> None:
    code = (
        "import logging; before = list(logging.root.handlers), logging.root.level\n"
        "import illava, pipeline, pipeline.cli, pipeline.__main__, pipeline.log; pipeline.load_config\n"
        "own = [logging.getLogger(name) for name in ('pipeline', 'illava')]\n"
        "print((list(logging.root.handlers), logging.root.level) == before, [(l.level, l.handlers) for l in own])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True [(0, []), (0, [])]\n", "")


def test_an_actor_logs_as_its_driver_does() -> None:
    """In a process of its own, as Ray's actors are: style, level and fields arrive pickled."""
    assert log_settings() is None
    log_like(None)  # of a driver that has set nothing up
    with log_to_stderr("json", debug=True):
        add_log_fields(run="runs/x")
        settings = log_settings()
    code = (
        "import logging, sys; from pipeline.log import LogSettings, log_like\n"
        f"log_like(LogSettings{tuple(settings)!r})\n"
        "logging.getLogger('pipeline.x').debug('words'); print('stray', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    said = [(line["level"], line["message"], line["run"]) for line in lines(done.stderr)]
    assert said == [("debug", "words", "runs/x"), ("info", "stray", "runs/x")]


def test_no_module_prints_to_stderr() -> None:
    """Results are printed, all else is logged."""
    sources = [path for folder in ("pipeline", "illava", "jobs") for path in (ROOT / folder).rglob("*.py")]
    printing = [
        path.name for path in sources if re.search(r"file=sys\.stderr|sys\.stderr\.write|print_exc", path.read_text())
    ]
    assert printing == ["log.py", "progress.py"], "what logging writes, and tqdm's bar on a terminal"

"""docs/cli.md: every command, its arguments and its exit codes, from the parsers that the commands use."""

from __future__ import annotations

import argparse

from docs.generators.markdown import GENERATED, plain, table
from docs.generators.parsers import ROOT, parser_of_module, parser_of_script

# What each exit code asks of whoever, or whatever, ran the command.
EXIT_CODES = {
    "0": ("all ok", "nothing"),
    "2": ("usage or configuration", "change the command or the file; the same command would end so again"),
    "3": ("finished, with failed items", "look at `error_type`, then `illava retry RUN_URI`"),
    "4": ("refused (another run's output)", "give the run an `output.uri` of its own, or the keys back that differ"),
    "5": ("infrastructure", "mend the cluster, the store or the machine; the same command resumes"),
    "6": ("stopped at its budget", "the same command resumes, with a new `--budget` or without"),
    "7": (
        "more items failed than `runtime.max_failed` allows",
        "mend what the summary names; the same command resumes, or `illava retry RUN_URI` where all items have rows",
    ),
    "130/143": ("interrupted", "the same command resumes"),
}


def page() -> str:
    """The whole page."""
    parts = [GENERATED, "# Commands", _INTRODUCTION, "## Exit codes", exit_codes(), _EXIT_NOTES]
    parts += ["## What is said, and where", _LOG_NOTES, "## `illava COMMAND`"]
    for name, parser in subcommands(parser_of_module("pipeline")).items():
        parts += [f"### `illava {name}`", *_command(parser)]
    parts += ["## Jobs for a cluster", _JOB_NOTES]
    for path in sorted((ROOT / "jobs").glob("*.py")):
        name = f"jobs/{path.name}"
        parts += [f"### `python {name}`", *_job(parser_of_script(name))]
    return "\n\n".join(part for part in parts if part) + "\n"


def exit_codes() -> str:
    """The table of exit codes, for this page and README."""
    return table(("code", "meaning", "what to do"), [(code, *words) for code, words in EXIT_CODES.items()])


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a command's commands; empty where it has none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _command(parser: argparse.ArgumentParser) -> list[str]:
    text = (parser.description or "").strip()
    first, *rest = text.split("\n\n")
    examples = "\n".join(line.strip() for part in rest for line in part.splitlines() if line.startswith("  "))
    notes = [plain(part) for part in rest if not part.startswith("  ")]
    sections = [plain(first), f"```sh\n{examples}\n```" if examples else "", *notes]
    return [*sections, _arguments(parser)]


def _job(parser: argparse.ArgumentParser) -> list[str]:
    """A job that is one of the commands has its flags, so they are not listed again."""
    parts = _command(parser)
    return parts[:-1] if "`illava " in (parser.description or "").rpartition("The same as")[2] else parts


def _arguments(parser: argparse.ArgumentParser) -> str:
    rows = [
        (_spelling(action), "required" if action.required else _default(action), plain(action.help or ""))
        for action in parser._actions
        if action.dest != "help" and action.help != argparse.SUPPRESS  # an old name
    ]
    return table(("argument", "", "meaning"), rows)


def _spelling(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings)
    value = "" if action.nargs == 0 else str(action.metavar or ("" if name else action.dest))
    return f"`{' '.join(part for part in (name, value) if part)}`"


def _default(action: argparse.Action) -> str:
    shown = action.default not in (None, False, argparse.SUPPRESS) and action.default not in ([], "")
    return f"`{action.default}` by default" if shown else ""


_INTRODUCTION = """\
`illava` stands in the environment where the project is installed (`. .venv/bin/activate`); `python -m pipeline` is the same program, and
runs in the root of the repository without an installation. The flags below are read from the commands' own parsers. A flag may be
abbreviated as long as it means one only."""
_EXIT_NOTES = """\
`verify` ends with 4 where an invariant does not hold. `status` ends with 0 whatever it has to tell. A pod or a cron line may run a
command again after 5, 6, 130 and 143; after 2, 3 and 4 running it again changes nothing."""
_LOG_NOTES = """\
Results go to stdout: summaries, dry runs, what `verify` found, the address of a report. All else is logged to stderr through Python's
`logging`, with the project's own lines from level INFO and those of libraries from WARNING. `--log` chooses how:

- `auto`, the default: words. On a terminal they are coloured, with time and level, above the progress bar; anywhere else they are plain.
- `plain`: words alone, on a terminal too. An error begins with "error: ".
- `json`: one JSON object a line, for a log collector. There is no bar; the line that says how far a run is comes every 30 seconds.

```json
{"time": "2026-12-01T02:00:07.123Z", "level": "info", "logger": "pipeline.execution.runner", "message": "demo: the model is on cpu, float32", "run": "runs/first"}
```

`time` (UTC), `level`, `logger` and `message` are always there; `run` is the run folder and `session` its file below `sessions/`, as soon as
they are known; `traceback` comes with `--debug`. What a library writes to Python's stderr is a line of the logger `stderr`, and
Python's warnings are lines of `py.warnings`. An error of the command line is a JSON line as well. Only what a C library writes past Python
is not; decoders run in a process of their own whose output is taken.

Ray's actors log in the same style and from the same level into their own files (`worker-*.err` below `/tmp/ray/session_latest/logs/`
on each node; `ray logs` shows them). With `--debug` Ray copies them to the driver's stderr, where each is the message of a line of
`stderr`.

In Python, `import pipeline` and `pipeline.run_job` set nothing up: the loggers `pipeline` and `illava` are yours to configure."""
_JOB_NOTES = """\
The scripts under jobs/ run the same functions, with the same flags, as the commands that they name. They need no installation where they run:
`ray job submit --working-dir . -- python jobs/...` uploads the repository and begins there."""

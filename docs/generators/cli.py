"""docs/cli.md: every command, its arguments and its exit codes, from the parsers that the commands use."""

from __future__ import annotations

import argparse

from docs.generators.markdown import GENERATED, plain, table
from docs.generators.parsers import ROOT, parser_of_module, parser_of_script

# What each exit code asks of whoever, or whatever, ran the command.
EXIT_CODES = {
    "0": ("all ok", "nothing"),
    "2": ("usage or configuration", "change the command or the file; the same command would end so again"),
    "3": ("finished, with failed items", "look at `error_type`, then `python -m pipeline retry RUN_URI`"),
    "4": ("refused (another run's output)", "give the run an `output.uri` of its own, or the keys back that differ"),
    "5": ("infrastructure", "mend the cluster, the store or the machine; the same command resumes"),
    "6": ("stopped at its budget", "the same command resumes, with a new `--budget` or without"),
    "130/143": ("interrupted", "the same command resumes"),
}


def page() -> str:
    """The whole page."""
    parts = [GENERATED, "# Commands", _INTRODUCTION, "## Exit codes", exit_codes(), _EXIT_NOTES, "## Jobs"]
    for path in sorted((ROOT / "jobs").glob("*.py")):
        name = f"jobs/{path.name}"
        parts += [f"### `python {name}`", *_command(parser_of_script(name))]
    parts.append("## `python -m pipeline COMMAND`")
    for name, parser in subcommands(parser_of_module("pipeline")).items():
        parts += [f"### `python -m pipeline {name}`", *_command(parser)]
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
Run every command in the root of the repository, with the `python` of its environment (`. .venv/bin/activate`). Each job also runs
on a cluster: `ray job submit --working-dir . -- python jobs/...`. The flags below are read from the commands' own parsers."""
_EXIT_NOTES = """\
`verify` ends with 4 where an invariant does not hold. `status` ends with 0 whatever it has to tell. A pod or a cron line may run a
command again after 5, 6, 130 and 143; after 2, 3 and 4 running it again changes nothing."""

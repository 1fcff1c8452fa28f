"""Parses the command line that jobs share, and does what its flags ask. Heavy imports wait for their use."""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.errors import ConfigError
from pipeline.exit_codes import EXIT_CODES, guarded
from pipeline.log import STYLES, asked_style, log_to_stderr
from pipeline.old_names import tell_new_name
from pipeline.redaction import visible

if TYPE_CHECKING:
    from pipeline.config.schema import JobConfig

logger = logging.getLogger(__name__)


class CommandParser(argparse.ArgumentParser):
    """Ends with 2 where the command line is wrong, and says what is wrong, the nearest that exists, and where to look.

    Attributes:
        commands: the parsers of its commands, where it has some.
    """

    commands: Mapping[str, CommandParser] = {}
    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; an unknown one is an error of the parser that met it."""
        self._given = sys.argv[1:] if args is None else list(args)
        if self.commands and self._given and not self._given[0].startswith("-"):
            self._check_command(self._given[0])
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Say what is wrong on stderr, in the style that ``--log`` asks for, and exit with 2."""
        with log_to_stderr(asked_style(self._given)):
            said = visible(f"{message}{self._meant()}")
            logger.error("%s: %s; what there is: %s --help", self.prog, said, self.prog)
        sys.exit(2)

    def _check_command(self, name: str) -> None:
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1)
            self.error(f"unknown command {name!r}" + "".join(f"; did you mean {one}?" for one in near))

    def _meant(self) -> str:
        """The flags that come nearest to those given that are none; a flag may be abbreviated."""
        known = [name for action in self._actions for name in action.option_strings]
        shown = [name for action in self._actions if action.help != argparse.SUPPRESS for name in action.option_strings]
        given = [word.partition("=")[0] for word in self._given if word.startswith("--")]
        wrong = [word for word in given if not any(name.startswith(word) for name in known)]
        near = {word: difflib.get_close_matches(word, shown, n=1) for word in wrong}
        return "".join(f"; by {word}, did you mean {found[0]}?" for word, found in near.items() if found)


def run_cli(description: str, argv: Sequence[str] | None = None) -> int:
    """Run a job's whole command, or its dry run, and return the exit code.

    Args:
        description: first thing ``--help`` says.
        argv: arguments without the program's name; the process's own by default.
    """
    return run_options(job_parser(description).parse_args(argv), job_command)


def config_cli(description: str, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None) -> int:
    """Run the command of what has a configuration and is no job, such as a sweep; otherwise as `run_cli`.

    Args:
        description: first thing ``--help`` says.
        run: from the flags of `add_common_flags` to the exit code.
        argv: arguments without the program's name; the process's own by default.
    """
    parser = _script_parser(description)
    add_common_flags(parser)
    return run_options(parser.parse_args(argv), run)


def run_options(options: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Run what the parsed flags ask for, with logging and errors as ``--log`` and ``--debug`` want them."""
    return guarded(lambda: run(_todays_flags(options)), debug=options.debug, log=options.log)


def job_parser(description: str) -> CommandParser:
    """Build the parser of a job under jobs/."""
    parser = _script_parser(description)
    add_job_flags(parser)
    return parser


def _script_parser(description: str) -> CommandParser:
    return CommandParser(
        prog=f"python {sys.argv[0]}",
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `add_common_flags`, and what only a job has."""
    add_common_flags(parser)
    parser.add_argument("--estimate", type=int, metavar="N", help="a dry run; then run N media, and estimate all")
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)  # its old name
    parser.add_argument(
        "--budget",
        metavar="25USD|3h[/run]",
        help="begin nothing new once this command, or with /run all on this run, spent it",
    )
    add_accept_flag(parser)
    parser.add_argument("--one-line", action="store_true", help="the summary in one line, for a cron mail")


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that everything with a configuration has."""
    parser.add_argument("--config", required=True, metavar="YAML", help="the job; see configs/")
    add_set_flag(parser, "override one key, such as runtime.executor=local; may be given several times")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items (input.limit)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; starts neither Ray nor a GPU")
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)  # its old name
    add_log_flags(parser, "tracebacks, and the actors' own output")


def add_set_flag(parser: argparse.ArgumentParser, text: str) -> None:
    """Add ``--set KEY=VALUE``."""
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=text)


def add_accept_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--accept KEY``."""
    text = "go on where this key differs, such as versions.torch after an update; recorded in the run"
    parser.add_argument("--accept", action="append", default=[], metavar="KEY", help=text)


def add_log_flags(parser: argparse.ArgumentParser, debug: str = "tracebacks") -> None:
    """Add the flags that every command has."""
    parser.add_argument("--debug", action="store_true", help=debug)
    text = "what is said on stderr: words, coloured on a terminal (auto), or one JSON object a line (json)"
    parser.add_argument("--log", choices=STYLES, default="auto", metavar="|".join(STYLES), help=text)


def _todays_flags(options: argparse.Namespace) -> argparse.Namespace:
    """The flags under today's names; says the new one of each old one."""
    if not hasattr(options, "plan"):
        return options
    probe = getattr(options, "probe", None)
    if probe is not None:
        if options.estimate is not None:
            raise ConfigError("--probe is the old name of --estimate, and both are given; leave --probe out")
        if not options.plan:
            raise ConfigError(f"--probe measures for a dry run; give --estimate {probe}")
        tell_new_name("--plan --probe N", "--estimate N")
        options.estimate = probe
    elif options.plan:
        tell_new_name("--plan", "--dry-run")
    options.dry_run = options.dry_run or options.plan
    return options


def job_command(options: argparse.Namespace) -> int:
    """Run the job, or the dry run, that the flags of `add_job_flags` ask for, and print its summary."""
    config = _config(options)
    flag = "--dry-run" if options.estimate is None else "--estimate"
    is_dry = options.dry_run or options.estimate is not None
    if is_dry and (options.budget or options.one_line):
        raise ConfigError(f"{flag} runs no job, so --budget and --one-line mean nothing beside it; leave them out")
    if is_dry:
        return _dry_run(config, options)
    from pipeline.evaluation.drift import drift_line
    from pipeline.execution.budget import parse_budget
    from pipeline.execution.reporting.summary import render_line, render_summary
    from pipeline.execution.runner import run_job

    budget = parse_budget(options.budget, config) if options.budget else None
    summary = run_job(config, budget=budget, accept=options.accept, debug=options.debug)
    drift = drift_line(summary.output_uri, config.input.exclude_runs) if summary.stats.num_rows else None
    if options.one_line:
        print(render_line(summary) + (f"; drift: {drift}" if drift else ""))
    else:
        print(render_summary(summary) + (f"\n  {'drift':<14} {drift}" if drift else ""))
    if summary.scores is not None:
        from pipeline.evaluation.run_scores import render_scores

        print(render_scores(summary.scores))
    return summary.exit_code


def _dry_run(config: JobConfig, options: argparse.Namespace) -> int:
    from pipeline.planning.dry_run import render_dry_run

    print(render_dry_run(config, accept=options.accept))
    if options.estimate is not None:
        from pipeline.planning.probe import probe, render_probe

        print(render_probe(probe(config, options.estimate, accept=options.accept, debug=options.debug)))
    return 0


def _config(options: argparse.Namespace) -> JobConfig:
    from pipeline.config.load import load_config

    return load_config(options.config, overrides_of(options))


def overrides_of(options: argparse.Namespace) -> list[str]:
    """Return what the flags of `add_common_flags` override in the file, ``--limit`` included."""
    return [*options.overrides, *([] if options.limit is None else [f"input.limit={options.limit}"])]

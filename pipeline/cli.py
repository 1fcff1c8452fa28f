"""Parses the command line that jobs share, and does what its flags ask. Heavy imports wait for their use."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.exit_codes import EXIT_CODES, guarded
from pipeline.old_names import tell_new_name

if TYPE_CHECKING:
    from pipeline.config.schema import JobConfig


def run_cli(description: str, argv: Sequence[str] | None = None) -> int:
    """Run a job's whole command, or its dry run, and return the exit code.

    Args:
        description: first thing ``--help`` says.
        argv: arguments without the program's name; the process's own by default.
    """
    options = job_parser(description).parse_args(argv)
    return guarded(lambda: _run(_todays_flags(options)), debug=options.debug)


def config_cli(description: str, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None) -> int:
    """Run the command of what has a configuration and is no job, such as a sweep; otherwise as `run_cli`.

    Args:
        description: first thing ``--help`` says.
        run: from the flags of `common_parser` to the exit code.
        argv: arguments without the program's name; the process's own by default.
    """
    options = common_parser(description).parse_args(argv)
    return guarded(lambda: run(_todays_flags(options)), debug=options.debug)


def job_parser(description: str) -> argparse.ArgumentParser:
    """Build the parser of a job: the flags of `common_parser`, and what only a job has."""
    parser = common_parser(description)
    parser.add_argument("--estimate", type=int, metavar="N", help="a dry run; then run N media, and estimate all")
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)  # its old name
    parser.add_argument("--budget", metavar="25USD|3h", help="begin nothing new once this is used up; resumable")
    parser.add_argument("--one-line", action="store_true", help="the summary in one line, for a cron mail")
    return parser


def common_parser(description: str) -> argparse.ArgumentParser:
    """Build the parser with the flags that everything under jobs/ has."""
    parser = argparse.ArgumentParser(
        description=description, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="the job; see configs/")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key, such as runtime.executor=local; may be given several times",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items (input.limit)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; starts neither Ray nor a GPU")
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)  # its old name
    parser.add_argument("--debug", action="store_true", help="tracebacks, and the actors' own output")
    return parser


def _todays_flags(options: argparse.Namespace) -> argparse.Namespace:
    """The flags under today's names; says the new one of each old one."""
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


def _run(options: argparse.Namespace) -> int:
    config = _config(options)
    flag = "--dry-run" if options.estimate is None else "--estimate"
    is_dry = options.dry_run or options.estimate is not None
    if is_dry and (options.budget or options.one_line):
        raise ConfigError(f"{flag} runs no job, so --budget and --one-line mean nothing beside it; leave them out")
    if is_dry:
        return _dry_run(config, options)
    from pipeline.execution.budget import parse_budget
    from pipeline.execution.runner import run_job
    from pipeline.execution.summary import render_line, render_summary

    budget = parse_budget(options.budget, config) if options.budget else None
    summary = run_job(config, budget=budget, debug=options.debug)
    print(render_line(summary) if options.one_line else render_summary(summary))
    if config.task.kind == "question" and not summary.num_left:
        from pipeline.evaluation.run_scores import render_scores, score_run

        print(render_scores(score_run(summary.output_uri)))
    return summary.exit_code


def _dry_run(config: JobConfig, options: argparse.Namespace) -> int:
    from pipeline.planning.dry_run import render_dry_run

    print(render_dry_run(config))
    if options.estimate is not None:
        from pipeline.planning.probe import probe, render_probe

        print(render_probe(probe(config, options.estimate, debug=options.debug)))
    return 0


def _config(options: argparse.Namespace) -> JobConfig:
    from pipeline.config.load import load_config

    return load_config(options.config, overrides_of(options))


def overrides_of(options: argparse.Namespace) -> list[str]:
    """Return what the flags of `common_parser` override in the file, ``--limit`` included."""
    return [*options.overrides, *([] if options.limit is None else [f"input.limit={options.limit}"])]

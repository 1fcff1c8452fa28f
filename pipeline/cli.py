"""The command line that every job shares: flags, exit codes, errors in words. Heavy imports wait until they are needed.

Knows nothing of how a job runs.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from illava.errors import ILLaVAError
from pipeline.errors import ConfigError, ItemError, PipelineError
from pipeline.known_errors import known_error
from pipeline.redaction import visible

if TYPE_CHECKING:
    from pipeline.config.schema import JobConfig

_OLDEST_PYTHON = (3, 11)
EXIT_CODES = """\
exit codes: 0 all ok · 2 usage or configuration · 3 finished, with failed items · 4 refused (another run's output) ·
5 infrastructure · 6 stopped at its budget · 130/143 interrupted; after 6, 130 and 143 the same command resumes"""


def run_cli(
    description: str, argv: Sequence[str] | None = None, *, when_finished: Callable[[str], str] | None = None
) -> int:
    """A job's whole command: parse, run or plan, print, and the exit code.

    Args:
        description: first thing ``--help`` says.
        argv: arguments without the program's name; the process's own by default.
        when_finished: from the run folder to what is printed below the summary of a finished run.
    """
    options = _job_parser(description).parse_args(argv)
    return guarded(lambda: _run(options, when_finished), debug=options.debug)


def guarded(command: Callable[[], int], *, debug: bool) -> int:
    """Run a command; its errors become words on stderr and an exit code, with a traceback only in debug mode."""
    if sys.version_info < _OLDEST_PYTHON:
        print(f"error: {sys.executable} is Python {sys.version.split()[0]}; 3.11 or newer is needed", file=sys.stderr)
        return 2
    try:
        return command()
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        words, exit_code = _told(error, debug=debug)
        print(visible(f"error: {words}"), file=sys.stderr)
        return exit_code


def _job_parser(description: str) -> argparse.ArgumentParser:
    parser = common_parser(description)
    parser.add_argument("--probe", type=int, metavar="N", help="with --plan: run N media, estimate all items")
    parser.add_argument("--budget", metavar="25USD|3h", help="begin nothing new once this is used up; resumable")
    parser.add_argument("--one-line", action="store_true", help="the summary in one line, for a cron mail")
    return parser


def common_parser(description: str) -> argparse.ArgumentParser:
    """The flags that everything under jobs/ has."""
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
    parser.add_argument("--plan", action="store_true", help="say what would be done; starts neither Ray nor a GPU")
    parser.add_argument("--debug", action="store_true", help="tracebacks, and the actors' own output")
    return parser


def _run(options: argparse.Namespace, when_finished: Callable[[str], str] | None) -> int:
    config = _config(options)
    if options.probe is not None and not options.plan:
        raise ConfigError("--probe measures for a plan; give --plan --probe N")
    if options.plan and (options.budget or options.one_line):
        raise ConfigError("--plan runs nothing, so --budget and --one-line mean nothing beside it; leave them out")
    if options.plan:
        return _plan(config, options)
    from pipeline.execution.budget import parse_budget
    from pipeline.execution.runner import run_job
    from pipeline.execution.summary import render_line, render_summary

    budget = parse_budget(options.budget, config) if options.budget else None
    summary = run_job(config, budget=budget, debug=options.debug)
    print(render_line(summary) if options.one_line else render_summary(summary))
    if when_finished is not None and not summary.num_left:
        print(when_finished(summary.output_uri))
    return summary.exit_code


def _plan(config: JobConfig, options: argparse.Namespace) -> int:
    from pipeline.planning.dry_run import render_plan

    print(render_plan(config))
    if options.probe is not None:
        from pipeline.planning.probe import probe, render_probe

        print(render_probe(probe(config, options.probe, debug=options.debug)))
    return 0


def _config(options: argparse.Namespace) -> JobConfig:
    from pipeline.config.load import load_config

    return load_config(options.config, overrides_of(options))


def overrides_of(options: argparse.Namespace) -> list[str]:
    """What the flags of `common_parser` override in the file, ``--limit`` included."""
    return [*options.overrides, *([] if options.limit is None else [f"input.limit={options.limit}"])]


def _told(error: Exception, *, debug: bool) -> tuple[str, int]:
    """What is said of an error, and the exit code; only what nothing is known of is called a defect."""
    if isinstance(error, ItemError) and error.error_type == "unsafe_uri":
        return str(error), 2  # of the configuration or the command line: a manifest's are refused as InputError
    if isinstance(error, PipelineError):
        return str(error), error.exit_code
    if isinstance(error, ILLaVAError):
        return str(error), 2
    if known := known_error(error):
        return known
    hint = "" if debug else "; this is a defect: --debug shows where"
    return f"{type(error).__name__}: {error}{hint}", 5

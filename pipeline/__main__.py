"""Runs `python -m pipeline COMMAND`: what can be done with run folders and benchmarks.

Each command's flags stand above what it does; heavy imports wait for it. Jobs have their command line in
`pipeline.cli`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.exit_codes import EXIT_CODES, guarded
from pipeline.old_names import COMMANDS, tell_new_name
from pipeline.redaction import visible


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline", description="Look after run folders; turn benchmarks into manifests."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_verify, _add_status, _add_retry, _add_report, _add_compare, _add_convert, _add_judge):
        add(commands)
    options = parser.parse_args(_todays_command(sys.argv[1:] if argv is None else argv))
    return guarded(lambda: options.run(options), debug=options.debug)


def _todays_command(arguments: Sequence[str]) -> Sequence[str]:
    if not arguments or arguments[0] not in COMMANDS:
        return arguments
    old, *rest = arguments
    tell_new_name(f"`python -m pipeline {old}`", f"`python -m pipeline {COMMANDS[old]}`")
    return [COMMANDS[old], *rest]


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, *, exit_codes: str | None = None
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=exit_codes)
    command.add_argument("--debug", action="store_true", help="tracebacks")
    command.set_defaults(run=run)
    return command


def _add_verify(commands: Any) -> None:
    text = "check every invariant of a run: each item one row, parts whole, sums right"
    exit_codes = "exit codes: 0 all hold · 4 one does not · 5 infrastructure"
    command = _command(commands, "verify", _verify, text, exit_codes=exit_codes)
    command.add_argument("uri", metavar="RUN_URI", help="the job's output.uri")


def _verify(options: argparse.Namespace) -> int:
    from pipeline.runs.verify import verify_run

    violations = verify_run(options.uri)
    for violation in violations:
        print(visible(str(violation)))
    print(f"{options.uri}: {len(violations)} violations" if violations else f"{options.uri}: all invariants hold")
    return 4 if violations else 0


def _add_status(commands: Any) -> None:
    exit_codes = "exit codes: 0 finished or not, whatever its rows say · 4 no run stands there · 5 infrastructure"
    command = _command(commands, "status", _status, "how far a run has come", exit_codes=exit_codes)
    command.add_argument("uri", metavar="RUN_URI", help="the job's output.uri")


def _status(options: argparse.Namespace) -> int:
    from pipeline.runs.status import render_status, run_status

    print(render_status(run_status(options.uri)))
    return 0


def _add_retry(commands: Any) -> None:
    text = (
        "compute a run's failed rows again, and documents of which the model failed pages, and publish their parts "
        "anew; all other rows stay as they are"
    )
    command = _command(commands, "retry", _retry, text, exit_codes=EXIT_CODES)
    command.add_argument("uri", metavar="RUN_URI", help="a run whose parts are all published")
    command.add_argument("--only", default="", metavar="TYPE,...", help="error types, such as store_error,load_timeout")
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key that changes no row, such as media.load_timeout_s=600; may be given several times",
    )


def _retry(options: argparse.Namespace) -> int:
    from pipeline.execution.runner import continue_run
    from pipeline.execution.summary import render_summary
    from pipeline.runs.retry import begin_retry

    only = [name.strip() for name in options.only.split(",") if name.strip()]
    summary = continue_run(begin_retry(options.uri, only=only, overrides=options.overrides), debug=options.debug)
    print(render_summary(summary))
    return summary.exit_code


def _add_report(commands: Any) -> None:
    text = "one HTML file about a run, beside its data: speed, tokens, cost, failures, some items with their frames"
    command = _command(commands, "report", _report, text)
    command.add_argument("uri", metavar="RUN_URI", help="finished or not")
    command.add_argument("--samples", type=int, default=6, metavar="N", help="items shown (6)")
    command.add_argument(
        "--overlays", type=int, default=0, metavar="N", help="load the model here, and draw what it keeps of N of them"
    )


def _report(options: argparse.Namespace) -> int:
    from pipeline.report.write import write_report

    print(visible(write_report(options.uri, num_samples=options.samples, num_overlays=options.overlays)))
    return 0


def _add_compare(commands: Any) -> None:
    text = "what differs between two runs over the same input, item by item, with intervals"
    command = _command(commands, "compare", _compare, text)
    command.add_argument("first", metavar="RUN_A", help="the reference, such as the unreduced run")
    command.add_argument("second", metavar="RUN_B")


def _compare(options: argparse.Namespace) -> int:
    from pipeline.evaluation.compare import compare_runs, render_comparison

    print(visible(render_comparison(compare_runs(options.first, options.second))))
    return 0


def _add_convert(commands: Any) -> None:
    text = "a benchmark's published files to a manifest for jobs/answer_questions.py"
    command = _command(commands, "convert", _convert, text)
    command.add_argument("benchmark", metavar="BENCHMARK", help="such as mmbench or videomme; a wrong name lists all")
    command.add_argument("source", metavar="SOURCE", help="a published file, or a prefix with several")
    command.add_argument("--media", required=True, metavar="PREFIX", help="of its videos, or where its images go")
    command.add_argument("--manifest", required=True, metavar="URI", help="to write; ends in .jsonl")
    command.add_argument("--subtitles", metavar="PREFIX", help="with NAME.srt, for videomme_subtitles")


def _convert(options: argparse.Namespace) -> int:
    from pipeline.evaluation.benchmarks.convert import write_manifest
    from pipeline.evaluation.benchmarks.registry import benchmark

    written = write_manifest(
        options.benchmark,
        options.source,
        media_uri=options.media,
        manifest_uri=options.manifest,
        subtitles_uri=options.subtitles,
    )
    table = benchmark(options.benchmark)
    print(f"{written.uri}: {written.num_items:,} questions on {written.num_media:,} media")
    if table.note:
        print(f"note: {table.note}")
    print(
        f"next: jobs/answer_questions.py with input.uri={options.media} input.manifest={written.uri} "
        f"task.choice_template=null task.open_template=null sampling.max_new_tokens={table.max_new_tokens}"
    )
    return 0


def _add_judge(commands: Any) -> None:
    text = "a run's answers in the file that the benchmark's own judge reads"
    command = _command(commands, "export-for-judge", _export_for_judge, text)
    command.add_argument("uri", metavar="RUN_URI", help="of a run over a converted manifest")
    command.add_argument("benchmark", metavar="BENCHMARK", help="such as mmvet; a wrong name lists all")
    command.add_argument("--output", required=True, metavar="URI", help="JSON file to write")


def _export_for_judge(options: argparse.Namespace) -> int:
    from pipeline.evaluation.benchmarks.judges import export_for_judge

    count = export_for_judge(options.uri, options.benchmark, options.output)
    print(f"{options.output}: {count:,} answers")
    return 0


if __name__ == "__main__":
    sys.exit(main())

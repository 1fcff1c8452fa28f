"""Runs `illava COMMAND`, or `python -m pipeline COMMAND`: jobs, and what can be done with run folders and benchmarks.

Each command's flags stand above what it does; heavy imports wait for it. The flags that jobs share, and what they do,
are in `pipeline.cli`; the scripts under jobs/ run the same.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from illava import __version__
from pipeline.cli import (
    CommandParser,
    add_accept_flag,
    add_common_flags,
    add_job_flags,
    add_log_flags,
    add_set_flag,
    job_command,
    run_options,
)
from pipeline.exit_codes import EXIT_CODES
from pipeline.log import add_log_fields
from pipeline.old_names import COMMANDS, tell_new_name
from pipeline.redaction import visible
from pipeline.report.command import draw_command
from pipeline.sweep.command import sweep_command

_Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    old = arguments[0] if arguments and arguments[0] in COMMANDS else None
    parser = build_parser()
    options = parser.parse_args([COMMANDS[old], *arguments[1:]] if old else arguments)

    def run(options: argparse.Namespace) -> int:
        if old:
            tell_new_name(f"`{parser.prog} {old}`", f"`{parser.prog} {COMMANDS[old]}`")
        if hasattr(options, "uri"):
            add_log_fields(run=options.uri)
        return options.run(options)

    return run_options(options, run)


def build_parser() -> CommandParser:
    """Build the parser of all commands."""
    as_module = sys.argv[0] == __file__
    text = "Run jobs over videos, images and documents; look after their run folders; turn benchmarks into manifests."
    parser = CommandParser(prog="python -m pipeline" if as_module else "illava", description=text)
    parser.add_argument("--version", action="version", version=f"illava {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.commands = commands.choices
    for add in (_add_jobs, _add_sweep, _add_draw, _add_status, _add_verify, _add_retry, _add_report, _add_compare):
        add(commands)
    for add in (_add_parity, _add_export, _add_erase, _add_convert, _add_judge):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: _Run, text: str, *, exit_codes: str | None = None) -> CommandParser:
    command: CommandParser = commands.add_parser(name, help=text, description=text, epilog=exit_codes)
    add_log_flags(command)
    command.set_defaults(run=run)
    return command


def _configured(commands: Any, name: str, run: _Run, text: str, more: str) -> CommandParser:
    """A command that has a configuration; its flags are the caller's to add."""
    command: CommandParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.\n\n{more}",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


_JOBS = {
    "caption": (
        "caption videos, images and image sets: one text an item, from object storage to Parquet",
        """\
  illava caption --config configs/demo.yaml
  illava caption --config configs/caption_videos_llava_onevision.yaml --dry-run
  illava caption --config configs/caption_images_llava_onevision.yaml --set input.uri=photos/ --limit 10

The same command again resumes; `illava verify OUTPUT` checks what was written.""",
    ),
    "answer": (
        "answer questions about videos and images: a manifest of media and questions in, answers with scores out",
        """\
  illava answer --config configs/answer_questions.yaml --dry-run

A benchmark's files become a manifest by `illava convert`; two runs are compared by `illava compare RUN_A RUN_B`.
The same command again resumes.""",
    ),
    "documents": (
        "read documents: PDFs, TIFFs and page images in, one row a document with every page's markdown or JSON out",
        """\
  illava documents --config configs/process_documents.yaml --dry-run
  illava documents --config configs/process_documents.yaml --set input.uri=papers/ --limit 10

Each listed file is one document; page images make one document where a manifest gives them in a column `uris`.
The same command again resumes; `illava verify OUTPUT` checks what was written.""",
    ),
}


def _add_jobs(commands: Any) -> None:
    for name, (text, more) in _JOBS.items():
        add_job_flags(_configured(commands, name, job_command, text, more))


def _add_sweep(commands: Any) -> None:
    text = "measure plans x settings x models on one set of items: one Parquet, one picture and one table a table"
    more = """\
  illava sweep --config configs/sweep_demo.yaml
  illava sweep --config configs/sweep_paper.yaml --set only=[table-4] --dry-run

Quality is accuracy where the manifest has references, and agreement with the unreduced model always; models of random
weights are refused unless `quality: false` asks for speed only. The same command goes on where it was stopped."""
    add_common_flags(_configured(commands, "sweep", sweep_command, text, more))


def _add_draw(commands: Any) -> None:
    text = "draw what a reduction keeps of some items: the input, each block of the tower, the language model"
    more = """\
  illava draw --config configs/draw_demo.yaml
  illava draw --config configs/caption_videos_qwen2_vl.yaml --limit 2 --set output.uri=runs/drawn

Takes any job's configuration. Writes PNG files and `kept_tokens.html`, which needs no network. Merged groups share a
colour, what is gone is dark."""
    add_common_flags(_configured(commands, "draw", draw_command, text, more))


def _add_verify(commands: Any) -> None:
    text = "check every invariant of a run: each item one row, parts whole, sums right"
    exit_codes = "exit codes: 0 all hold · 4 one does not · 5 infrastructure"
    command = _command(commands, "verify", _verify, text, exit_codes=exit_codes)
    command.add_argument("uri", metavar="RUN_URI", help="the job's output.uri")


def _verify(options: argparse.Namespace) -> int:
    from pipeline.inspection.verify import verify_run

    violations = verify_run(options.uri)
    for violation in violations:
        print(visible(str(violation)))
    print(f"{options.uri}: {len(violations)} violations" if violations else f"{options.uri}: all invariants hold")
    return 4 if violations else 0


def _add_status(commands: Any) -> None:
    exit_codes = "exit codes: 0 finished or not, whatever its rows say · 4 no run stands there · 5 infrastructure"
    command = _command(
        commands, "status", _status, "how far a run, or each run of a folder, has come", exit_codes=exit_codes
    )
    command.add_argument("uri", metavar="RUN_URI", help="the job's output.uri, or the folder in which several lie")


def _status(options: argparse.Namespace) -> int:
    from pipeline.evaluation.drift import drift_line
    from pipeline.inspection.status import render_runs, render_status, runs_status
    from pipeline.storage import storage

    statuses = runs_status(options.uri)
    is_one = [storage.folder_uri(options.uri)] == [one.uri for one in statuses]
    print(visible(render_status(statuses[0]) if is_one else render_runs(statuses)))
    if is_one and (drift := drift_line(statuses[0].uri, statuses[0].nights_uri)):
        print(f"  drift    {drift}")
    return 0


def _add_retry(commands: Any) -> None:
    text = (
        "compute a run's failed rows again, and documents of which the model failed pages, and publish their parts "
        "anew; all other rows stay as they are"
    )
    command = _command(commands, "retry", _retry, text, exit_codes=EXIT_CODES)
    command.add_argument("uri", metavar="RUN_URI", help="a run whose parts are all published")
    command.add_argument("--only", default="", metavar="TYPE,...", help="error types, such as store_error,load_timeout")
    text = "override one key that changes no row, such as media.load_timeout_s=600; may be given several times"
    add_set_flag(command, text)
    add_accept_flag(command)


def _retry(options: argparse.Namespace) -> int:
    from pipeline.execution.reporting.summary import render_summary
    from pipeline.execution.runner import continue_run
    from pipeline.runs.retry import begin_retry

    only = [name.strip() for name in options.only.split(",") if name.strip()]
    run = begin_retry(options.uri, only=only, overrides=options.overrides, accept=options.accept)
    summary = continue_run(run, debug=options.debug)
    print(render_summary(summary))
    if summary.scores is not None:
        from pipeline.evaluation.run_scores import render_scores

        print(render_scores(summary.scores))
    return summary.exit_code


def _add_report(commands: Any) -> None:
    text = "one HTML file about a run, beside its data: speed, tokens, cost, failures, some items with their frames"
    command = _command(commands, "report", _report, text)
    command.add_argument("uri", metavar="RUN_URI", help="finished or not")
    command.add_argument("--samples", type=int, default=6, metavar="N", help="items shown (6)")
    _add_without(command)
    command.add_argument(
        "--overlays", type=int, default=0, metavar="N", help="load the model here, and draw what it keeps of N of them"
    )


def _report(options: argparse.Namespace) -> int:
    from pipeline.inspection.withheld import parse_without
    from pipeline.report.write import write_report

    leave_out = parse_without(options.without)
    written = write_report(options.uri, num_samples=options.samples, num_overlays=options.overlays, leave_out=leave_out)
    print(visible(written))
    return 0


def _add_compare(commands: Any) -> None:
    text = "what differs between two runs over the same input, item by item, with intervals"
    command = _command(commands, "compare", _compare, text)
    command.add_argument("first", metavar="RUN_A", help="the reference, such as the unreduced run")
    command.add_argument("second", metavar="RUN_B")
    command.add_argument("--json", action="store_true", help="print one JSON object, all flipped items included")
    text = "write an HTML page to this file: what is printed, and each flipped item with its frames"
    command.add_argument("--report", metavar="URI", help=text)


def _compare(options: argparse.Namespace) -> int:
    from pipeline.evaluation.compare import compare_runs
    from pipeline.evaluation.comparison_text import comparison_json, render_comparison

    comparison = compare_runs(options.first, options.second)
    text = comparison_json(comparison) if options.json else visible(render_comparison(comparison))
    print(text)
    if options.report:
        from pipeline.report.compare_page import write_comparison

        uri = visible(write_comparison(comparison, options.report))
        if options.json:
            logging.getLogger(__name__).info("written: %s", uri)  # stdout is one JSON object
        else:
            print(uri)
    return 0


def _add_parity(commands: Any) -> None:
    text = "a model's answers, logits and token counts beside stock transformers, on your own files"
    exit_codes = "exit codes: 0 they agree · 2 usage, or a model that cannot be loaded · 4 they differ"
    command = _command(commands, "parity", _parity, text, exit_codes=exit_codes)
    command.add_argument(
        "model", metavar="MODEL", help="folder or hub id, of plain weights; they are loaded twice, in turn"
    )
    files = "videos, pictures, PDFs (their first 3 pages); without any, a drawn picture and video"
    command.add_argument("files", metavar="FILE", nargs="*", help=files)
    command.add_argument("--revision", metavar="COMMIT", help="of the hub")
    command.add_argument("--dtype", default="auto", help="float32 compares best; auto is it on CPU, bfloat16 on CUDA")
    command.add_argument("--device", default="auto", help="cpu, cuda or cuda:N")
    command.add_argument("--prompt", default="Describe what you see.", help="asked about each file")
    command.add_argument("--num-frames", type=int, default=8, metavar="N", help="of a video")
    command.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="of each answer")


def _parity(options: argparse.Namespace) -> int:
    from pipeline.own_files.parity import parity_of_files, render_parity

    parity = parity_of_files(
        options.model,
        options.files,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        prompt=options.prompt,
        num_frames=options.num_frames,
        max_new_tokens=options.max_new_tokens,
    )
    print(visible(render_parity(parity)))
    return 0 if parity.holds else 4


def _add_without(command: CommandParser) -> None:
    text = "leave out addresses and messages (uri), what was asked (prompt), your columns (fields), pictures (frames)"
    command.add_argument("--without", default="", metavar="uri,prompt,fields,frames", help=text)


def _add_export(commands: Any) -> None:
    text = "a run's rows as CSV, JSON, JSON lines or Markdown; of each document a Markdown file with its pages in order"
    command = _command(commands, "export", _export, text)
    command.add_argument("uri", metavar="RUN_URI", help="finished or not")
    command.add_argument(
        "--format", required=True, choices=("csv", "json", "jsonl", "md"), help="md: a table of answers"
    )
    command.add_argument("--to", required=True, metavar="URI", help="file to write; a folder for documents as md")
    _add_without(command)


def _export(options: argparse.Namespace) -> int:
    from pipeline.inspection.export import export_run
    from pipeline.inspection.withheld import parse_without

    leave_out = parse_without(options.without)
    print(visible(export_run(options.uri, options.format, options.to, leave_out=leave_out)))
    return 0


def _add_erase(commands: Any) -> None:
    text = "erase items of a finished run: addresses, prompts, columns, answers; their rows stay, as `erased`"
    command = _command(commands, "erase", _erase, text)
    command.add_argument("uri", metavar="RUN_URI", help="a run whose parts are all published")
    command.add_argument("--items", required=True, metavar="URI", help="a text: an item's id or address on each line")


def _erase(options: argparse.Namespace) -> int:
    from pipeline.runs.erase import erase_run

    done = erase_run(options.uri, options.items)
    before = done.num_named - done.num_rows
    print(visible(f"{done.uri}: {done.num_rows:,} rows erased" + (f", {before:,} erased before" if before else "")))
    print("  what was exported or reported elsewhere, a bucket's older versions, and the media themselves are yours")
    return 0


def _add_convert(commands: Any) -> None:
    text = "a benchmark's published files to a manifest for `illava answer`"
    command = _command(commands, "convert", _convert, text)
    command.add_argument("--list", action=_ListBenchmarks, nargs=0, help="list the benchmarks, and end")
    command.add_argument("benchmark", metavar="BENCHMARK", help="such as mmbench or videomme; --list lists all")
    command.add_argument("source", metavar="SOURCE", help="a published file, or a prefix with several")
    command.add_argument("--media", required=True, metavar="PREFIX", help="of its videos, or where its images go")
    command.add_argument("--manifest", required=True, metavar="URI", help="to write; ends in .jsonl")
    command.add_argument("--subtitles", metavar="PREFIX", help="with NAME.srt, for videomme_subtitles")


def _convert(options: argparse.Namespace) -> int:
    from pipeline.evaluation.benchmarks.convert import write_manifest
    from pipeline.evaluation.benchmarks.registry import benchmark, next_command

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
    print(f"next: {next_command(options.benchmark, media_uri=options.media, manifest_uri=written.uri)}")
    return 0


class _ListBenchmarks(argparse.Action):
    def __call__(self, *_given: Any) -> None:
        """Print the list and end, whatever else is given."""
        from pipeline.evaluation.benchmarks.registry import render_list

        print(render_list())
        raise SystemExit(0)


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

"""Run the demo: the tiny demo model captions and answers with merged tokens and without, beside the references.

  python jobs/demo.py [--set key=value ...] [--seconds 15]

Makes two runs of configs/demo_questions.yaml, below runs/demo; the same command again recomputes nothing. The model is
too small to gain time, so a few layers of a published model's true shape are measured beside it, with random weights.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/x.py` puts only jobs/ on the path

import pipeline
from pipeline.cli import CommandParser, add_log_flags, add_set_flag, run_options

logger = logging.getLogger(__name__)


def demo(config: str, overrides: list[str], *, seconds: float) -> int:
    """Make both runs and print what they wrote, what a larger model gains, and what to do next; the worse exit code."""
    from pipeline.evaluation.reference_report import render_references

    merged = pipeline.load_config(config, overrides)
    whole_uri = merged.output.uri.rstrip("/").removesuffix("/merged") + "/whole"
    whole = pipeline.load_config(config, [*overrides, "reduction={preset: none}", f"output.uri={whole_uri}"])
    code = 0
    for job in (whole, merged):
        summary = pipeline.run_job(job)
        if summary.num_left:
            return summary.exit_code
        code = max(code, summary.exit_code)
    print(render_references({"whole": whole.output.uri, "merged": merged.output.uri}))
    print(f"report     {pipeline.write_report(merged.output.uri, num_overlays=3)}")
    print(f"time       {_time(seconds)}")
    print(_next(whole.output.uri, merged.output.uri))
    return code


def _time(seconds: float) -> str:
    why = "this model is too small to gain time: choosing tokens costs it as much as fewer tokens save"
    if seconds <= 0:
        return why
    logger.info("measuring a few layers of a published model's shape, %.0f s", seconds)
    from benchmarks.speed.few_layers import measure_few_layers

    return f"{why}.\n           {measure_few_layers(seconds)};\n           whole models: docs/benchmarks.md"


def _next(whole_uri: str, merged_uri: str) -> str:
    return f"""\
next       illava compare {whole_uri} {merged_uri}
           illava draw --config configs/draw_demo.yaml
           illava caption --config configs/demo.yaml --dry-run
           your own media: docs/quickstart.md"""


if __name__ == "__main__":
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_set_flag(parser, "override one key of both runs, such as runtime.executor=local; may be given several times")
    parser.add_argument("--seconds", type=float, default=15.0, help="of measuring true-shape layers (15); 0: none")
    add_log_flags(parser)
    sys.exit(
        run_options(
            parser.parse_args(),
            lambda options: demo("configs/demo_questions.yaml", options.overrides, seconds=options.seconds),
        )
    )

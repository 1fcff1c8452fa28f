"""Run the demo: the tiny demo model captions and answers with merged tokens and without, beside the references.

  python jobs/demo.py [--set key=value ...]

Makes two runs of configs/demo_questions.yaml, below runs/demo; the same command again recomputes nothing.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python jobs/x.py` puts only jobs/ on the path

import pipeline
from pipeline.cli import CommandParser, add_log_flags, add_set_flag, run_options


def demo(config: str, overrides: list[str]) -> int:
    """Make both runs and print what they wrote; the worse exit code."""
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
    return code


if __name__ == "__main__":
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_set_flag(parser, "override one key of both runs, such as runtime.executor=local; may be given several times")
    add_log_flags(parser)
    sys.exit(run_options(parser.parse_args(), lambda options: demo("configs/demo_questions.yaml", options.overrides)))

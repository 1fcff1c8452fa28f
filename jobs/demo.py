"""The demo: the bundled toy model captions and answers with merged tokens and without, beside the truth.

  python jobs/demo.py [--set key=value ...]

Two runs of configs/demo_questions.yaml, below runs/demo; the same command again recomputes nothing.
"""

import argparse
import sys
from pathlib import Path

# `python jobs/x.py` puts jobs/ on the path, not the repository that holds the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import guarded


def demo(overrides: list[str]) -> int:
    """Both runs, what they wrote, and the worse exit code."""
    from pipeline.config.load import load_config
    from pipeline.evaluation.reference_report import render_truth
    from pipeline.execution.runner import run_job
    from pipeline.report.write import write_report

    path = "configs/demo_questions.yaml"
    merged = load_config(path, overrides)
    whole_uri = merged.output.uri.rstrip("/").removesuffix("/merged") + "/whole"
    whole = load_config(path, [*overrides, "reduction={preset: none}", f"output.uri={whole_uri}"])
    code = 0
    for config in (whole, merged):
        summary = run_job(config)
        if summary.num_left:
            return summary.exit_code
        code = max(code, summary.exit_code)
    print(render_truth({"whole": whole.output.uri, "merged": merged.output.uri}))
    print(f"report     {write_report(merged.output.uri, num_overlays=3)}")
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    sys.exit(guarded(lambda: demo(parser.parse_args().overrides), debug=False))

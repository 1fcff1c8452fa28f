"""Counts how often `--estimate N` foretells the next run: estimate and run, each a process of its own, by turns.

A try counts as covered where the run's seconds, as its summary has them, lie in the interval of wall time. The
machine's other work is part of it: run this beside whatever else runs. The load average is recorded.

    python benchmarks/reliability/estimate_coverage.py --config configs/demo.yaml --estimate 8 --tries 20 \
        --set input.uri=runs/clips/ --set runtime.executor=local --json OUT.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.machine import write_json

_ESTIMATE = """
import json, sys
from pipeline.config.load import load_config
from pipeline.planning.dry_run import render_dry_run
from pipeline.planning.probe import probe
config = load_config(sys.argv[1], sys.argv[3:])
render_dry_run(config)
found = probe(config, int(sys.argv[2]))
wall = found.wall_s
print(json.dumps({"total_s": wall.total, "low_s": wall.low, "high_s": wall.high, "fixed_s": found.fixed_s}))
"""
_RUN = """
import json, sys
from pipeline.config.load import load_config
from pipeline.execution.runner import run_job
summary = run_job(load_config(sys.argv[1], sys.argv[3:]))
print(json.dumps({"wall_s": summary.wall_s, "num_rows": summary.stats.num_rows, "exit_code": summary.exit_code}))
"""


def one_try(config: str, num_groups: int, overrides: list[str]) -> dict[str, Any]:
    """Estimate, then run: the interval, and the seconds that the run took."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [config, str(num_groups), *overrides, f"output.uri={folder}/run"]
        found = _last_line(_ESTIMATE, arguments) | _last_line(_RUN, arguments)
    covered = found["low_s"] <= found["wall_s"] <= found["high_s"]
    return found | {"covered": covered, "load_average": os.getloadavg()[0]}


def _last_line(code: str, arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Make the tries, print each, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--estimate", type=int, default=8, metavar="N")
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    tries = []
    for number in range(args.tries):
        tries.append(one_try(args.config, args.estimate, [*args.overrides, f"seed={number}"]))
        print(json.dumps(tries[-1]), flush=True)
    covered, widest = sum(one["covered"] for one in tries), max(one["high_s"] / one["low_s"] for one in tries)
    print(f"{covered} of {len(tries)} covered; the upper end is at most {widest:.2f} times the lower")
    if args.json:
        setting = {"config": args.config, "estimate": args.estimate, "overrides": args.overrides}
        result = {"num_covered": covered, "num_tries": len(tries), "widest": widest, "tries": tries}
        write_json(args.json, {"benchmark": "estimate_coverage", "setting": setting, **result})


if __name__ == "__main__":
    main()

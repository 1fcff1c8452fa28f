"""Runs a driver that shares its run with another: each waits at every creation and publish for the other.

A program: ``python one_of_two_drivers.py OUTPUT INPUT GATES NAME``, INPUT being the ``input`` section as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from pipeline.execution.runner import run_job
from pipeline.faults import injected
from tests.support.runs import fakes

_PATIENCE_S = 240.0


def main(output: str, source: str, gates: str, name: str) -> int:
    """Exit code of the job."""
    until_s = time.monotonic() + _PATIENCE_S

    def stand_at(gate: str) -> list[Path]:
        return list(Path(gates).glob(f"{gate}-*"))

    def meet(point: str, subject: str) -> None:
        if point == "publish_before" or (point == "write" and subject.endswith("/run.json")):
            gate = f"{point}-{Path(subject).name}"
            Path(gates, f"{gate}-{name}").touch()
            while len(stand_at(gate)) < 2:
                if stand_at("ended") or time.monotonic() > until_s:
                    raise RuntimeError(f"the other driver never came to {gate}")
                time.sleep(0.005)

    config = fakes.job_config(output, json.loads(source))
    try:
        with injected(meet):
            return run_job(config, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader).exit_code
    finally:
        Path(gates, f"ended-{name}").touch()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Runs `illava erase` up to the n-th fault point, says so, and waits for its end: ``python THIS N TIMES_REPLACED ...``.

At the N-th change of the folder, or the N-th rename of a file that is written, the process prints a line and reads
from stdin, which nobody writes to; who started it ends it by SIGKILL and pid.
"""

from __future__ import annotations

import os
import sys

from pipeline.__main__ import main
from pipeline.faults import injected

if __name__ == "__main__":
    point, number, run, items = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    passed: list[str] = []

    def stop_at(name: str) -> None:
        passed.extend([name] * (name == point))
        if name == point and len(passed) == number:
            print("here", flush=True)
            sys.stdin.read()

    rename = os.replace

    def replace(*arguments: object, **more: object) -> None:
        stop_at("rename")
        rename(*arguments, **more)  # type: ignore[arg-type]

    os.replace = replace  # type: ignore[assignment]
    with injected(lambda name, subject: stop_at(name) if "." in subject.rpartition("/")[2] else None):
        sys.exit(main(["erase", run, "--items", items]))

"""`python -m pipeline verify|status RUN_URI`: what can be done with a run folder. Heavy imports wait for a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipeline.cli import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description="Look after a run folder.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, help_text) in _COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("uri", metavar="RUN_URI", help="the job's output.uri")
        command.add_argument("--debug", action="store_true", help="tracebacks")
    options = parser.parse_args(argv)
    run, _ = _COMMANDS[options.command]
    return guarded(lambda: run(options.uri), debug=options.debug)


def _verify(uri: str) -> int:
    from pipeline.verify import verify_run

    violations = verify_run(uri)
    for violation in violations:
        print(violation)
    print(f"{uri}: {len(violations)} violations" if violations else f"{uri}: all invariants hold")
    return 4 if violations else 0


def _status(uri: str) -> int:
    from pipeline.status import render_status, run_status

    print(render_status(run_status(uri)))
    return 0


_COMMANDS = {
    "verify": (_verify, "check every invariant of a run: each item one row, parts whole, sums right"),
    "status": (_status, "how far a run has come"),
}

if __name__ == "__main__":
    sys.exit(main())

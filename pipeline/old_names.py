"""Accepts the names that an earlier version had for keys, flags and commands, and says the new one on stderr.

Each is accepted for one release. A frozen configuration of a run is read under its names for ever, and in silence:
that is `pipeline.runs.run_record.RENAMED_KEYS`.
"""

from __future__ import annotations

import sys

# Dotted key of a configuration -> today's.
KEYS = {"input.skip_done_in": "input.exclude_runs"}
# Command of `python -m pipeline` -> today's.
COMMANDS = {"adapt": "convert"}


def tell_new_name(old: str, new: str) -> None:
    """Say on stderr what is to be written in place of an old name."""
    print(f"note: {old} is called {new} now; the next release no longer knows the old name", file=sys.stderr)

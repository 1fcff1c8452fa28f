"""Accepts the names that an earlier version had for keys, flags and commands, and logs the new one.

Also logs what of a plan the next release no longer has.

Each is accepted for one release. A frozen configuration of a run is read under its names for ever, and in silence:
that is `pipeline.runs.run_record.RENAMED_KEYS`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from illava.plan import ReductionPlan

logger = logging.getLogger(__name__)
# Dotted key of a configuration -> today's.
KEYS = {"input.skip_done_in": "input.exclude_runs"}
# Command of `python -m pipeline` -> today's.
COMMANDS = {"adapt": "convert"}


def tell_new_name(old: str, new: str) -> None:
    """Log what is to be written in place of an old name."""
    logger.warning("note: %s is called %s now; the next release no longer knows the old name", old, new)


def tell_deprecated(plan: ReductionPlan) -> None:
    """Log what is to be written in place of a deprecated part of a plan."""
    from illava.plan import deprecations  # pydantic, of which a Python without packages is told in words

    for sentence in deprecations(plan):
        logger.warning("note: %s", sentence)

"""Runs the command line of a drawing: the flags of every job; ``--dry-run`` lists the items and draws nothing.

Heavy imports wait until they are needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.cli import config_cli, overrides_of


def draw_cli(description: str, argv: Sequence[str] | None = None) -> int:
    """Draw a job's items, or say which, and return the exit code."""
    return config_cli(description, draw_command, argv)


def draw_command(options: argparse.Namespace) -> int:
    """Draw what the flags of `pipeline.cli.add_common_flags` ask for, and print what was written."""
    from pipeline.config.load import load_config

    config = load_config(options.config, overrides_of(options))
    if options.dry_run:
        from pipeline.planning.dry_run import render_dry_run

        print(render_dry_run(config))
        return 0
    from pipeline.report.draw import draw_job

    for uri in draw_job(config):
        print(uri)
    return 0

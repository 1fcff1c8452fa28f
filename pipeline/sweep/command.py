"""Runs the command line of a sweep: the flags of every job; ``--dry-run`` counts tokens and measures nothing.

Heavy imports wait until they are needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.cli import config_cli, overrides_of

if TYPE_CHECKING:
    from pipeline.sweep.config import SweepConfig


def sweep_cli(description: str, argv: Sequence[str] | None = None) -> int:
    """Run a sweep's whole command, or its dry run, and return the exit code."""
    return config_cli(description, sweep_command, argv)


def sweep_command(options: argparse.Namespace) -> int:
    """Run the sweep that the flags of `pipeline.cli.add_common_flags` ask for, and print its tables."""
    from pipeline.config.load import load_as
    from pipeline.sweep.config import SweepConfig

    config = load_as(SweepConfig, options.config, overrides_of(options))
    if options.dry_run:
        print(render_sweep_dry_run(config))
        return 0
    from pipeline.sweep.run import run_sweep

    code = run_sweep(config)
    print(render_results(config))
    return code


def render_sweep_dry_run(config: SweepConfig) -> str:
    """List the points to measure, each checked against its model's shape and counted for one 1024 px image.

    Raises:
        PlanError: a plan that makes no sense for its model.
    """
    from illava.families.model_shape import load_model_shape
    from illava.token_counts import VisualShape, expected_counts
    from pipeline.execution.batch_limit import ASSUMED_IMAGE_PX
    from pipeline.retention import Retention
    from pipeline.sweep.run import open_sweep

    sweep = open_sweep(config)
    pending = {point.key for point in sweep.pending}
    lines = [f"{config.name}: {len(pending)} of {len(config.wanted())} points to measure on {len(sweep.items)} items"]
    for point in config.wanted():
        model = config.models[point.model]
        shape = load_model_shape(model.model_id, revision=model.revision, pixel_limits=config.media.pixel_limits)
        counts = expected_counts(
            shape.geometry,
            point.plan,
            [VisualShape("image", ASSUMED_IMAGE_PX, ASSUMED_IMAGE_PX)],
            num_vision_blocks=shape.num_vision_blocks,
            num_decoder_layers=shape.num_decoder_layers,
        )
        state = "to do" if point.key in pending else "done"
        lines.append(
            f"  {point.table:10s} {point.model:16s} {point.row:40s} {state:5s} an image: {Retention.of(counts).brief}"
        )
    return "\n".join([*lines, f"  output     {config.output.uri}"])


def render_results(config: SweepConfig) -> str:
    """Render every table that has rows, in Markdown."""
    from pipeline.sweep.results import FILE, read_results
    from pipeline.sweep.table import markdown_table

    done, uri = read_results(config.output.uri), config.output.uri.rstrip("/")
    parts = []
    for table in config.tables:
        rows = [row for row in done if row.table == table]
        if rows:
            parts.append(f"{table}: {uri}/{table}.svg\n\n{markdown_table(rows)}\n")
    return "\n".join([*parts, f"{len(done)} rows: {uri}/{FILE}"])

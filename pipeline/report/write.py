"""Writes a run folder's ``report.html``."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError, PipelineError
from pipeline.inputs.passwords import read_passwords
from pipeline.records import MediaItem, ResultRow
from pipeline.report.figures import RunFigures, run_figures
from pipeline.report.page import render_report
from pipeline.report.picture import Picture
from pipeline.report.pictures import item_pictures
from pipeline.report.withhold import withhold, withhold_pictures
from pipeline.runs.run_folder import read_frozen_manifest
from pipeline.runs.run_record import RUN_FILE, recorded_config
from pipeline.storage import storage

REPORT_FILE = "report.html"


def write_report(
    uri: str, *, num_samples: int = 6, num_overlays: int = 0, leave_out: frozenset[str] = frozenset()
) -> str:
    """Write the report of a run, finished or not; its URI.

    Args:
        uri: the run folder.
        num_samples: items shown with their frames.
        num_overlays: for so many of them the model is loaded here and run again, to draw what it keeps.
        leave_out: kinds of `pipeline.inspection.withheld` that the report does not show.

    Raises:
        ConfigError: overlays are asked for, and no frames.
        RefusedError: the folder holds no run.
        StorageError: a part cannot be read, or the report not be written.
    """
    if "frames" in leave_out and num_overlays:
        raise ConfigError("--overlays draws on frames, and --without frames shows none; leave out one of them")
    figures = run_figures(uri, num_samples=num_samples)
    pictures = [] if "frames" in leave_out else _pictures(figures, num_overlays=num_overlays)
    shown = withhold_pictures(pictures or [[] for _ in figures.samples], leave_out)
    target = storage.join(figures.uri, REPORT_FILE)
    page = render_report(withhold(figures, leave_out), shown, num_overlays=num_overlays)
    storage.write_atomic(target, page.encode())
    return target


def _pictures(figures: RunFigures, *, num_overlays: int) -> list[list[Picture]]:
    """Of each sample; why there are none, where the run's own record no longer leads to its media."""
    if not figures.samples:
        return []
    record, rows = figures.record, figures.samples
    try:
        config = recorded_config(record, source=storage.join(figures.uri, RUN_FILE))
        items = _items(figures, rows, config)
    except PipelineError as error:
        return [[Picture("frames", reason=str(error))] for _ in rows]
    return list(item_pictures(config, items, [row.text for row in rows], num_overlays=num_overlays))


def _items(figures: RunFigures, rows: Sequence[ResultRow], config: JobConfig) -> list[MediaItem]:
    """The manifest's own lines: they say which version of an object was read."""
    per_shard = figures.record["items_per_shard"]
    manifest = read_frozen_manifest(figures.uri, figures.record["manifest_digest"])
    found: dict[str, MediaItem] = {}
    for shard in {row.shard_index for row in rows}:
        found |= {item.item_id: item for item in manifest.slice(shard * per_shard, per_shard)}
    return list(read_passwords(config).give(found[row.item_id] for row in rows))

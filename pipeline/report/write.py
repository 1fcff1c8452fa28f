"""Writes a run folder's ``report.html``."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import PipelineError
from pipeline.records import MediaItem, ResultRow
from pipeline.report.figures import RunFigures, run_figures
from pipeline.report.page import render_report
from pipeline.report.picture import Picture
from pipeline.report.pictures import item_pictures
from pipeline.runs.run_folder import read_frozen_manifest
from pipeline.runs.run_record import RUN_FILE, recorded_config
from pipeline.storage import storage

REPORT_FILE = "report.html"


def write_report(uri: str, *, num_samples: int = 6, num_overlays: int = 0) -> str:
    """Write the report of a run, finished or not; its URI.

    Args:
        uri: the run folder.
        num_samples: items shown with their frames.
        num_overlays: for so many of them the model is loaded here and run again, to draw what it keeps.

    Raises:
        RefusedError: the folder holds no run.
        StorageError: a part cannot be read, or the report not be written.
    """
    figures = run_figures(uri, num_samples=num_samples)
    pictures = _pictures(figures, num_overlays=num_overlays)
    target = storage.join(figures.uri, REPORT_FILE)
    storage.write_atomic(target, render_report(figures, pictures).encode())
    return target


def _pictures(figures: RunFigures, *, num_overlays: int) -> list[list[Picture]]:
    """Of each sample; why there are none, where the run's own record no longer leads to its media."""
    if not figures.samples:
        return []
    record, rows = figures.record, figures.samples
    try:
        config = recorded_config(record, source=storage.join(figures.uri, RUN_FILE))
        items = _items(figures, rows)
    except PipelineError as error:
        return [[Picture("frames", reason=str(error))] for _ in rows]
    return list(item_pictures(config, items, [row.text for row in rows], num_overlays=num_overlays))


def _items(figures: RunFigures, rows: Sequence[ResultRow]) -> list[MediaItem]:
    """The manifest's own lines: they say which version of an object was read."""
    per_shard = figures.record["items_per_shard"]
    manifest = read_frozen_manifest(figures.uri, figures.record["manifest_digest"])
    found: dict[str, MediaItem] = {}
    for shard in {row.shard_index for row in rows}:
        found |= {item.item_id: item for item in manifest.slice(shard * per_shard, per_shard)}
    return [found[row.item_id] for row in rows]

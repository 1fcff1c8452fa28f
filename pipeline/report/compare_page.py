"""Writes a comparison of two runs as one HTML page: the figures, and each flipped item with its frames."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import PipelineError
from pipeline.evaluation.compare import Comparison, FlippedItem
from pipeline.evaluation.comparison_text import differing_lines
from pipeline.report.html import render_html
from pipeline.report.page import within_budget
from pipeline.report.picture import Picture
from pipeline.report.pictures import item_pictures
from pipeline.runs.run_folder import read_frozen_manifest
from pipeline.runs.run_record import RUN_FILE, read_run_file, recorded_config
from pipeline.storage import storage

_MAX_DRAWN = 100
_MAX_CHARACTERS = 2000


def write_comparison(comparison: Comparison, uri: str) -> str:
    """Write the page; returns its address.

    Frames are read again, as the first run read them; where that cannot be, the reason stands in their place.

    Raises:
        StorageError: the page cannot be written.
    """
    lost = [one for one in comparison.flipped if one.is_lost]
    shown = (lost + [one for one in comparison.flipped if not one.is_lost])[:_MAX_DRAWN]
    pictures = _pictures(comparison.first_uri, shown)
    page = render_html(
        "compare.html.jinja",
        title="Two runs compared",
        max_characters=_MAX_CHARACTERS,
        filters={"number": lambda value: f"{value:.4g}"},
        comparison=comparison,
        config_lines=differing_lines(comparison),
        items=list(zip(shown, within_budget([pictures])[0], strict=True)),
        num_lost=len(lost),
    )
    storage.write_atomic(uri, page.encode())
    return uri


def _pictures(run_uri: str, items: Sequence[FlippedItem]) -> list[Picture]:
    """The frames of each item."""
    if not items:
        return []
    try:
        record = read_run_file(run_uri)
        config = recorded_config(record, source=storage.join(run_uri, RUN_FILE))
        manifest = read_frozen_manifest(run_uri, record["manifest_digest"])
        media = [manifest.slice(one.place, 1)[0] for one in items]
    except PipelineError as error:
        return [Picture("frames", reason=str(error)) for _ in items]
    texts = [one.texts[0] for one in items]
    return [frames for frames, *_ in item_pictures(config, media, texts, num_overlays=0)]

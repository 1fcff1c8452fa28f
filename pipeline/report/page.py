"""Renders a run's figures and pictures as one HTML page that is never larger than 10 MB."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.inputs.input_counts import say_left_out
from pipeline.records import ResultRow
from pipeline.report.figures import RunFigures
from pipeline.report.html import render_html
from pipeline.report.picture import Picture, shown
from pipeline.retention import Retention

MAX_BYTES = 10_000_000
_PICTURE_BYTES = 8_000_000  # as base64; the rest is text
_MAX_CHARACTERS = 2000


def render_report(figures: RunFigures, pictures: Sequence[Sequence[Picture]]) -> str:
    """Render the page; always smaller than `MAX_BYTES`.

    Args:
        figures: of the run.
        pictures: of each of its samples.
    """
    config = figures.record.get("config") or {}
    return render_html(
        "page.html.jinja",
        title=f"{config.get('name', 'run')}: report",
        max_characters=_MAX_CHARACTERS,
        filters={
            "seconds": _seconds,
            "usd": _usd,
            "count": _count,
            "share": _share,
            "size": _size,
            "left_out": say_left_out,
            "brief": _brief,
        },
        run=figures,
        config=config,
        samples=list(zip(figures.samples, _within_budget(pictures), strict=True)),
        num_rows=figures.totals.num_rows,
        sums=figures.totals.sums,
        retention=Retention.of(figures.totals.sums),
        cost=figures.cost,
    )


def _within_budget(pictures: Sequence[Sequence[Picture]]) -> list[list[dict[str, Any]]]:
    """Pictures as text, the first ones first, until the page is full."""
    left, found = _PICTURE_BYTES, []
    for some in pictures:
        drawn = []
        for picture in map(shown, some):
            num_bytes = sum(len(tile["data"]) for tile in picture["tiles"])
            if num_bytes > left:
                picture |= {"tiles": [], "reason": "left out: the page would be larger than 10 MB"}
            else:
                left -= num_bytes
            drawn.append(picture)
        found.append(drawn)
    return found


def _brief(row: ResultRow) -> str:
    return Retention.of(row).brief


def _seconds(value: float) -> str:
    if value < 0.9995:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 600 else f"{value / 3600:.2f} h"


def _usd(value: float) -> str:
    """Three digits at least, never with an exponent; below a tenth of a millionth only that it is so."""
    if abs(value) >= 100 or not value:
        return f"${value:,.2f}"
    if abs(value) < 1e-7:
        return "under $0.0000001"
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"${value:.{max(2, 2 - exponent)}f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _share(value: float, of: float = 1.0) -> str:
    return f"{value / of:.1%}" if of else "-"


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"

"""Renders a run's figures and pictures as one HTML page that is never larger than 10 MB."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from illava.plan import ReductionPlan
from pipeline.inputs.input_counts import say_left_out
from pipeline.records import ResultRow
from pipeline.report.figures import RunFigures
from pipeline.report.html import render_html
from pipeline.report.picture import Picture, shown
from pipeline.report.plan_text import plan_lines
from pipeline.retention import Retention
from pipeline.runs.page_counts import PageCounts

MAX_BYTES = 10_000_000
_PICTURE_BYTES = 8_000_000  # as base64; the rest is text
_MAX_CHARACTERS = 2000
_MAX_PROMPTS, _MAX_NAMES = 3, 3
_FRAMES = ("num_frames", "frame_sampling")
_MEDIA_KEYS: dict[Any, tuple[str, ...]] = {"document": ("max_pages", "page_dpi")}


def render_report(figures: RunFigures, pictures: Sequence[Sequence[Picture]], *, num_overlays: int = 0) -> str:
    """Render the page; always smaller than `MAX_BYTES`.

    Args:
        figures: of the run.
        pictures: of each of its samples.
        num_overlays: of so many of the samples kept tokens were to be drawn.
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
            "name": _name,
            "score": _score,
        },
        run=figures,
        config=config,
        asked=_asked(figures, config),
        num_overlays=num_overlays,
        anchors={row.item_id: f"item-{number}" for number, row in enumerate(figures.samples, 1)},
        samples=list(zip(figures.samples, within_budget(pictures), strict=True)),
        num_rows=figures.totals.num_rows,
        sums=figures.totals.sums,
        pages=PageCounts.of(figures.totals.pages) if figures.totals.pages else None,
        retention=Retention.of(figures.totals.sums),
        cost=figures.cost,
    )


def _asked(figures: RunFigures, config: dict[str, Any]) -> list[tuple[str, str]]:
    """What the rows depend on, as (name, text)."""
    model, task, sampling, media = (config.get(name) or {} for name in ("model", "task", "sampling", "media"))
    revision = f" at {model['revision']}" if model.get("revision") else ""
    prompts = {row.prompt: None for row in figures.samples}
    asked = [("model", f"{model.get('model_id', '')}{revision}, {model.get('dtype', '')}"), ("plan", _plan(config))]
    if prompts:
        name = "prompt" if len(prompts) == 1 else "prompts, such as"
        asked.append((name, "\n".join(list(prompts)[:_MAX_PROMPTS])))
    words = [("task", task, ("kind", "metric")), ("media", media, _MEDIA_KEYS.get(task.get("kind"), _FRAMES))]
    words.append(("sampling", sampling, ("max_new_tokens", "temperature", "top_p")))
    for name, section, keys in words:
        asked.append((name, ", ".join(f"{key} {_plain(section[key])}" for key in keys if section.get(key) is not None)))
    digest, attempt = figures.record["recipe_digest"][:12], figures.record["attempt"]
    asked.append(("config fingerprint", f"{digest}, attempt {attempt}"))
    return [(name, text) for name, text in asked if text]


def _plan(config: dict[str, Any]) -> str:
    """The recorded plan; as it stands where an earlier version worded it otherwise."""
    plan = config.get("reduction") or {}
    try:
        return "\n".join(plan_lines(ReductionPlan.model_validate(plan)))
    except ValueError:
        return json.dumps(plan)


def _plain(value: Any) -> str:
    return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def _name(row: ResultRow) -> str:
    """The names of its objects, without their folders."""
    names = [uri.rstrip("/").rpartition("/")[2] or uri for uri in row.uris or (row.uri,)]
    return ", ".join(names[:_MAX_NAMES]) + (f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else "")


def _score(value: float) -> str:
    return f"{value:.3f}"


def within_budget(pictures: Sequence[Sequence[Picture]]) -> list[list[dict[str, Any]]]:
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

"""Draws a sweep's table as one SVG, from its rows alone: quality against cost, then a line a row.

Places are computed, not solved for: every part has its own strip, so nothing overlaps, and the file is the same on
every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from pipeline.sweep.results import COMPONENTS, SweepRow
from pipeline.sweep.svg import INKS, label, plot_style, svg_of, without_glyph_warnings

_WIDTH, _MARGIN = 9.6, 0.15  # inches, as all below
_PANEL, _TITLE, _UNDER_AXIS, _BESIDE_AXIS = 2.6, 0.62, 0.55, 0.75
_LINE, _HEAD, _GAP, _DODGE = 0.21, 0.45, 0.4, 0.1
_MARKERS = "os^Dv<>pPX"
_COMPONENT_INKS = ("#1f6fb4", "#d1495b", "#e0b52b")
_SAME = 0.02  # of an axis: marks so near to each other are drawn side by side


@dataclass(frozen=True, slots=True)
class _Axis:
    """A quantity as an axis: its title, and its value."""

    title: str
    value: Callable[[SweepRow], float | None]


_KEPT = _Axis("visual tokens in the last layer, % of the whole model's", lambda row: row.kept_percent)
_TIME = _Axis("seconds an item, in a batch", lambda row: row.s_per_item)


def draw_sweep(title: str, rows: Sequence[SweepRow]) -> str:
    """Draw the picture of `sweep_figure` as SVG."""
    with plot_style():
        return svg_of(sweep_figure(title, rows))


def sweep_figure(title: str, rows: Sequence[SweepRow]) -> Figure:
    """Plot quality against kept tokens and time; below, a line a row: quality, seconds by component, memory.

    What was not measured is left out.
    """
    quality = "accuracy" if any(row.accuracy is not None for row in rows) else "top-1 agreement"
    scatters = [x for x in (_KEPT, _TIME) if any(x.value(row) is not None and row.quality is not None for row in rows)]
    columns = [
        (name, draw)
        for name, draw, is_measured in (
            (f"{quality}, 95 %", _qualities, lambda row: row.quality is not None),
            ("one request, seconds", _bars, lambda row: row.vision_s is not None),
            ("peak memory, MiB", _memories, lambda row: row.peak_memory_mib is not None),
        )
        if any(map(is_measured, rows))
    ]
    lines, top = len(rows) * _LINE, _PANEL + _UNDER_AXIS if scatters else 0.0
    height = _TITLE + top + _HEAD + lines + _UNDER_AXIS
    figure = Figure(figsize=(_WIDTH, height))
    figure.text(_MARGIN / _WIDTH, 1 - 0.2 / height, label(title, 100), fontsize=11, va="center")
    figure.text(_MARGIN / _WIDTH, 1 - 0.42 / height, _subtitle(rows), color="#666666", va="center")
    place = _Place(figure, height)
    each = (_WIDTH - _MARGIN) / max(len(scatters), 1)
    for n, x in enumerate(scatters):
        ax = place.axes(n * each + _BESIDE_AXIS, _TITLE, each - _BESIDE_AXIS, _PANEL)
        _scatter(ax, x, quality, rows)
    above = _TITLE + top + _HEAD
    left = _names(place.axes(0, above, _WIDTH, lines), rows)
    each = (_WIDTH - _MARGIN - left) / max(len(columns), 1)
    for n, (name, draw) in enumerate(columns):
        ax = place.axes(left + n * each + _GAP / 2, above, each - _GAP, lines)
        ax.set(ylim=(len(rows) - 0.5, -0.5), yticks=[])
        ax.set_title(name, loc="left", pad=14)
        draw(ax, rows)
        ax.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    return figure


@dataclass(frozen=True, slots=True)
class _Place:
    """Puts axes on a figure, in inches from its left and its top."""

    figure: Figure
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Make axes at this place."""
        return self.figure.add_axes(
            (left / _WIDTH, 1 - (top + height) / self.height, width / _WIDTH, height / self.height)
        )


def _subtitle(rows: Sequence[SweepRow]) -> str:
    counts = sorted({row.num_items for row in rows})
    items = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return f"{items} items; a mark stands for the same row everywhere"


def _mark(number: int) -> dict[str, Any]:
    """A row's colour and shape; a hundred rows differ."""
    return {"color": INKS[number % len(INKS)], "marker": _MARKERS[number // len(INKS) % len(_MARKERS)]}


def _names(ax: Axes, rows: Sequence[SweepRow]) -> float:
    """Write each row's name behind its mark, in inches; return where the longest ends."""
    several = len({row.model for row in rows}) > 1
    ax.set(xlim=(0, _WIDTH), ylim=(len(rows) - 0.5, -0.5), xticks=[], yticks=[])
    ax.axis("off")
    end = 0.0
    for number, row in enumerate(rows):
        ax.plot([_MARGIN + 0.05], [number], markersize=5, linestyle="", **_mark(number))
        name = label(f"{row.model}: {row.row}" if several else row.row)
        text = ax.text(_MARGIN + 0.2, number, name, va="center")
        with without_glyph_warnings():
            end = max(end, text.get_window_extent().x1 / ax.figure.dpi)
    return math.ceil(end * 10) / 10  # not a matter of a letter's last pixel


def _scatter(ax: Axes, x: _Axis, quality: str, rows: Sequence[SweepRow]) -> None:
    """Draw a mark a row, with its interval; marks of one place side by side."""
    shown = [(number, x.value(row), row) for number, row in enumerate(rows)]
    points = [(number, at, row) for number, at, row in shown if at is not None and row.quality is not None]
    right = 1.08 * max(at for _, at, _ in points) or 1.0
    ax.set(xlim=(0, right), xlabel=x.title, ylabel=quality)
    shifts = _side_by_side([at for _, at, _ in points], _SAME * right)
    for (number, at, row), shift in zip(points, shifts, strict=True):
        moved = ax.transData + ScaledTranslation(shift * _DODGE, 0, ax.figure.dpi_scale_trans)
        low, own, high = _quality_of(row)
        ax.vlines([at], [low], [high], color=_mark(number)["color"], linewidth=1, transform=moved, clip_on=False)
        ax.plot([at], [own], markersize=5, linestyle="", transform=moved, clip_on=False, **_mark(number))
    ends = [end for _, _, row in points for end in _quality_of(row)]
    room = 0.06 * ((max(ends) - min(ends)) or 1.0)
    ax.set_ylim(min(ends) - room, max(ends) + room)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _side_by_side(values: Sequence[float], same: float) -> list[float]:
    """How many marks each is moved to the right, so that those at one place do not cover each other."""
    order = sorted(range(len(values)), key=values.__getitem__)
    shifts = [0.0] * len(values)
    while order:
        group = [n for n in order if values[n] - values[order[0]] <= same]
        for place, n in enumerate(sorted(group)):
            shifts[n] = place - (len(group) - 1) / 2
        order = order[len(group) :]
    return shifts


def _quality_of(row: SweepRow) -> tuple[float, float, float]:
    """The lower end of the interval of `SweepRow.quality`, itself, and the upper end; itself where there is none."""
    if row.accuracy is None:
        low, high = row.agreement_top1_low, row.agreement_top1_high
    else:
        low, high = row.accuracy_low, row.accuracy_high
    own = row.quality or 0.0
    return own if low is None else low, own, own if high is None else high


def _qualities(ax: Axes, rows: Sequence[SweepRow]) -> None:
    for number, row in enumerate(rows):
        if row.quality is not None:
            low, own, high = _quality_of(row)
            ax.hlines([number], [low], [high], color=_mark(number)["color"], linewidth=1)
            ax.plot([own], [number], markersize=5, linestyle="", **_mark(number))


def _bars(ax: Axes, rows: Sequence[SweepRow]) -> None:
    """Draw seconds of single requests by component, and what the unreduced model took in turn with them."""
    longest = 0.0
    for number, row in enumerate(rows):
        if row.vision_s is None:
            continue
        left = 0.0
        for name, ink in zip(COMPONENTS, _COMPONENT_INKS, strict=True):
            seconds = getattr(row, name)
            ax.barh([number], [seconds], left=[left], color=ink, height=0.62)
            left += seconds
        whole = sum(getattr(row, f"whole_{name}") for name in COMPONENTS)
        ax.vlines([whole], [number - 0.42], [number + 0.42], color="#222222", linewidth=1.2)
        low, high = row.request_s_low, row.request_s_high
        if low is not None and high is not None:
            ax.hlines([number], [low], [high], color="#222222", linewidth=0.8)
        end = max(left, whole, high or 0.0)
        longest = max(longest, end)
        if left:
            ax.annotate(f"{whole / left:.2f}x", (end, number), (4, 0), textcoords="offset points", va="center", size=7)
    ax.set_xlim(0, 1.3 * longest or 1.0)
    ax.grid(visible=False, axis="y")
    keys = zip(
        ("tower", "prefill", "decode", "| unreduced"), (*_COMPONENT_INKS, "#222222"), (0, 26, 53, 84), strict=True
    )
    for name, ink, offset_pt in keys:
        ax.annotate(name, (0, 1), (offset_pt, 3), "axes fraction", "offset points", color=ink, size=7)


def _memories(ax: Axes, rows: Sequence[SweepRow]) -> None:
    most = max(row.peak_memory_mib or 0.0 for row in rows)
    for number, row in enumerate(rows):
        if (mib := row.peak_memory_mib) is not None:
            ax.barh([number], [mib], color="#9aa6b6", height=0.62)
            ax.annotate(f"{mib:,.0f}", (mib, number), (4, 0), textcoords="offset points", va="center", size=7)
    ax.set_xlim(0, 1.3 * most or 1.0)
    ax.grid(visible=False, axis="y")

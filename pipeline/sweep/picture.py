"""Draws a sweep's table as one SVG of small panels, from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from pipeline.sweep.results import COMPONENTS, SweepRow
from pipeline.sweep.svg import INKS, label, plot_style, svg_of

_WIDTH, _PANEL_HEIGHT, _LINE_HEIGHT = 9.6, 2.9, 0.19  # inches
_MARKERS = "os^Dv<>pPX"
_COMPONENT_INKS = ("#1f6fb4", "#d1495b", "#e0b52b")


@dataclass(frozen=True, slots=True)
class _Axis:
    """A quantity as an axis: its title, its value, and whether it starts at 0."""

    title: str
    value: Callable[[SweepRow], float | None]
    from_zero: bool = True


_KEPT = _Axis("visual tokens in the last layer, % of the whole model's", lambda row: row.kept_percent)
_TIME = _Axis("seconds an item, in a batch", lambda row: row.s_per_item)
_MEMORY = _Axis("peak memory, MiB", lambda row: row.peak_memory_mib)


def draw_sweep(title: str, rows: Sequence[SweepRow]) -> str:
    """Draw the picture of `sweep_figure` as SVG."""
    with plot_style():
        return svg_of(sweep_figure(title, rows))


def sweep_figure(title: str, rows: Sequence[SweepRow]) -> Figure:
    """Plot quality, time and memory against kept tokens, quality against time and memory, and time by component.

    A panel that nothing was measured for is left out.
    """
    has_accuracy = any(row.accuracy is not None for row in rows)
    quality = _Axis("accuracy" if has_accuracy else "top-1 agreement", lambda row: row.quality, from_zero=False)
    panels = [
        (x, y)
        for x, y in ((_KEPT, quality), (_KEPT, _TIME), (_KEPT, _MEMORY), (_TIME, quality), (_MEMORY, quality))
        if any(x.value(row) is not None and y.value(row) is not None for row in rows)
    ]
    timed = [row for row in rows if row.vision_s is not None]
    names = [label(f"{row.model}: {row.row}") for row in rows]
    num_columns = max(1, min(3, 160 // (max(map(len, names)) + 8)))
    heights = [
        -(-len(panels) // 2) * _PANEL_HEIGHT,
        (-(-len(names) // num_columns) + 1) * _LINE_HEIGHT,
        (len(timed) + len({row.model for row in timed}) + 4) * _LINE_HEIGHT if timed else 0,
    ]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.3), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    figure.suptitle(label(title, 100), fontsize=11)
    heights = [height for height in heights if height]
    blocks = iter(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat)
    if panels:
        axes = list(next(blocks).subplots(-(-len(panels) // 2), 2, squeeze=False).flat)
        for (x, y), ax in zip(panels, axes, strict=False):
            _scatter(ax, x, y, rows)
        for ax in axes[len(panels) :]:
            ax.remove()
    marks = [Line2D([], [], linestyle="", **_mark(number)) for number in range(len(names))]
    next(blocks).legend(marks, names, loc="center", ncols=num_columns)
    if timed:
        _bars(next(blocks).subplots(), timed)
    return figure


def _mark(number: int) -> dict[str, Any]:
    """A row's colour and shape; a hundred rows differ."""
    return {"color": INKS[number % len(INKS)], "marker": _MARKERS[number // len(INKS) % len(_MARKERS)]}


def _scatter(ax: Axes, x: _Axis, y: _Axis, rows: Sequence[SweepRow]) -> None:
    """One mark a row; with the interval where it is accuracy."""
    rights, tops = [0.0], [0.0]
    for number, row in enumerate(rows):
        right, top = x.value(row), y.value(row)
        if right is None or top is None:
            continue
        ax.plot([right], [top], markersize=5, linestyle="", **_mark(number))
        if y.title == "accuracy" and row.accuracy_low is not None and row.accuracy_high is not None:
            ax.vlines(right, row.accuracy_low, row.accuracy_high, color=_mark(number)["color"], linewidth=1)
        rights.append(right)
        tops.append(top)
    ax.set(xlabel=x.title, ylabel=y.title)
    if x.from_zero:
        ax.set_xlim(0, 1.08 * max(rights) or 1.0)
    if y.from_zero:
        ax.set_ylim(0, 1.08 * max(tops) or 1.0)


def _bars(ax: Axes, rows: Sequence[SweepRow]) -> None:
    """Seconds of single requests by component, each model's unreduced mean first."""
    bars: list[tuple[str, list[float]]] = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        whole = [sum(getattr(row, f"whole_{name}") for row in own) / len(own) for name in COMPONENTS]
        bars.append((f"{model}: whole (mean of {len(own)})", whole))
        bars += [(f"{model}: {row.row}", [getattr(row, name) for name in COMPONENTS]) for row in own]
    places, lefts = range(len(bars)), [0.0] * len(bars)
    for n, (name, ink) in enumerate(zip(("tower", "prefill", "decode"), _COMPONENT_INKS, strict=True)):
        seconds = [parts[n] for _, parts in bars]
        ax.barh(places, seconds, left=lefts, color=ink, label=name, height=0.7)
        lefts = [left + one for left, one in zip(lefts, seconds, strict=True)]
    ax.set_yticks(places, [label(name) for name, _ in bars])
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.set(xlabel="seconds", title="time of one request by component")
    ax.legend(loc="lower left", bbox_to_anchor=(1.0, 0.0))

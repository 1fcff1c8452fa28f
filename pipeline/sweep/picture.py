"""A sweep's table as one SVG of small panels and as Markdown, from its rows alone. No dependency, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pipeline.sweep.results import SweepRow

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 300, 58, 44, 30
_INKS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8e6bbf", "#e08e2b", "#444444", "#b0708a", "#5aa9a3", "#a9812b", "#3c8dbc")
_PARTS = (("vision_s", "tower", "#1f6fb4"), ("prefill_s", "prefill", "#d1495b"), ("decode_s", "decode", "#e0b52b"))

_Value = Callable[[SweepRow], float | None]


@dataclass(frozen=True, slots=True)
class _Axis:
    """A column as an axis: its title, its value, and whether it starts at 0."""

    title: str
    value: _Value
    from_zero: bool = True


def _kept(row: SweepRow) -> float | None:
    return None if row.kept_ratio is None else 100 * row.kept_ratio


def _s_per_item(row: SweepRow) -> float | None:
    return 1 / row.items_per_s if row.items_per_s else None


def _mib(row: SweepRow) -> float | None:
    return None if row.peak_memory_bytes is None else row.peak_memory_bytes / 2**20


_KEPT = _Axis("visual tokens in the last layer, % of the whole model's", _kept)
_TIME = _Axis("seconds an item, in a batch", _s_per_item)
_MEMORY = _Axis("peak memory, MiB", _mib)


def quality_of(row: SweepRow) -> float | None:
    """Accuracy where there are references, else top-1 agreement with the unreduced model."""
    return row.agreement_top1 if row.accuracy is None else row.accuracy


def draw_sweep(title: str, rows: Sequence[SweepRow]) -> str:
    """Quality, time and memory against kept tokens, quality against time and memory, and time by component.

    A panel that nothing was measured for is left out.
    """
    named = "accuracy" if any(row.accuracy is not None for row in rows) else "top-1 agreement"
    quality = _Axis(named, quality_of, from_zero=False)
    panels = [
        _scatter(x, y, rows)
        for x, y in ((_KEPT, quality), (_KEPT, _TIME), (_KEPT, _MEMORY), (_TIME, quality), (_MEMORY, quality))
        if any(x.value(row) is not None and y.value(row) is not None for row in rows)
    ]
    timed = [row for row in rows if row.vision_s is not None]
    height = -(-len(panels) // 2) * _HEIGHT + 40
    marks = [_moved(part, (n % 2) * _WIDTH, 40 + (n // 2) * _HEIGHT) for n, part in enumerate(panels)]
    marks.append(_moved(_legend(rows), 0, height))
    height += 16 * len(rows) + 20
    if timed:
        marks.append(_moved(_bars(timed), 0, height))
        height += 18 * (len(timed) + len({row.model for row in timed})) + 50
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _WIDTH} {height}" font-family="sans-serif"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'{head} font-size="11">{ground}', _text(12, 22, title, size=15), *marks, "</svg>"]) + "\n"


def markdown_table(rows: Sequence[SweepRow]) -> str:
    """The layout of the paper's tables: a row a plan; tokens, quality, seconds by component, memory."""
    head = "| row | model | kept | quality | change [95 %] | top-1 agreement, KL | tower, prefill, decode vs whole | "
    lines = [head + "s an item | memory MiB |", "|---" * 9 + "|"]
    for row in rows:
        quality, change, agreement = "-", "-", "-"
        if row.accuracy is not None:
            quality = f"{row.accuracy:.3f}"
            change = f"{row.difference:+.3f} [{row.difference_low:+.3f}, {row.difference_high:+.3f}]"
        if row.agreement_top1 is not None:
            agreement = f"{row.agreement_top1:.3f}, {row.agreement_kl_nats:.3f}"
        ratios = [_ratio(getattr(row, f"whole_{name}"), getattr(row, name)) for name, _, _ in _PARTS]
        cells = [row.row, row.model, _cell(_kept(row), ".0f", " %"), quality, change, agreement, ", ".join(ratios)]
        cells += [_cell(_s_per_item(row), ".3g"), _cell(_mib(row), ".0f")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(whole: float | None, own: float | None) -> str:
    return "-" if whole is None or not own else f"{whole / own:.2f}x"


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _scatter(x: _Axis, y: _Axis, rows: Sequence[SweepRow]) -> str:
    """One mark a row, in the row's ink; the interval where it is accuracy."""
    points = [(n, row, x.value(row), y.value(row)) for n, row in enumerate(rows)]
    place_x = _scale([px for _, _, px, py in points if px is not None and py is not None], x.from_zero)
    ys = [py for _, _, px, py in points if px is not None and py is not None]
    if y.value is quality_of:
        ys += [end for row in rows for end in (row.accuracy_low, row.accuracy_high) if end is not None]
    place_y = _scale(ys, y.from_zero)
    marks = [*_frame(x.title, y.title, place_x, place_y)]
    for n, row, px, py in points:
        if px is None or py is None:
            continue
        left, top = _LEFT + place_x.at(px) * _SPAN_X, _HEIGHT - _BOTTOM - place_y.at(py) * _SPAN_Y
        if y.value is quality_of and row.accuracy_low is not None and row.accuracy_high is not None:
            ends = (_HEIGHT - _BOTTOM - place_y.at(end) * _SPAN_Y for end in (row.accuracy_low, row.accuracy_high))
            marks.append(_line(left, next(ends), left, next(ends), _ink(n)))
        name = escape(f"{row.model}: {row.row}: {py:.4g} at {px:.4g}")
        marks.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="{_ink(n)}"><title>{name}</title></circle>')
        marks.append(_text(left + 6, top - 4, str(n + 1), ink=_ink(n), size=9))
    return "".join(marks)


_SPAN_X, _SPAN_Y = _WIDTH - _LEFT - 24, _HEIGHT - _BOTTOM - _TOP


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float

    def at(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def _scale(values: Sequence[float], from_zero: bool) -> _Scale:
    low, high = (0.0 if from_zero else min(values)), max(values)
    room = (high - low) * 0.08 or max(abs(high), 1.0) * 0.08
    return _Scale(low if from_zero else low - room, high + room)


def _frame(x_title: str, y_title: str, x: _Scale, y: _Scale) -> list[str]:
    marks = []
    for quarter in range(5):
        share = quarter / 4
        left, top = _LEFT + share * _SPAN_X, _HEIGHT - _BOTTOM - share * _SPAN_Y
        marks.append(_line(_LEFT, top, _LEFT + _SPAN_X, top, "#dddddd"))
        marks.append(_text(_LEFT - 6, top + 4, f"{y.low + share * (y.high - y.low):.3g}", anchor="end"))
        tick = f"{x.low + share * (x.high - x.low):.3g}"
        marks.append(_text(left, _HEIGHT - _BOTTOM + 15, tick, anchor="middle"))
    marks.append(_text(_LEFT + _SPAN_X / 2, _HEIGHT - 10, x_title, anchor="middle"))
    marks.append(_text(_LEFT, 18, y_title))
    return marks


def _legend(rows: Sequence[SweepRow]) -> str:
    return "".join(
        f'<circle cx="20" cy="{16 * n + 8}" r="4" fill="{_ink(n)}"/>'
        + _text(32, 16 * n + 12, f"{n + 1}  {row.model}: {row.row}")
        for n, row in enumerate(rows)
    )


def _bars(rows: Sequence[SweepRow]) -> str:
    """Seconds of single requests by component, each model's unreduced mean first."""
    bars: list[tuple[str, list[float]]] = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        whole = [sum(getattr(row, f"whole_{name}") for row in own) / len(own) for name, _, _ in _PARTS]
        bars.append((f"{model}: whole (mean of {len(own)})", whole))
        bars += [(f"{model}: {row.row}", [getattr(row, name) for name, _, _ in _PARTS]) for row in own]
    longest = max(sum(parts) for _, parts in bars) or 1.0
    marks = [_text(12, 12, "time of one request by component")]
    for n, (_, name, ink) in enumerate(_PARTS):
        marks.append(f'<rect x="{240 + 90 * n}" y="3" width="10" height="10" fill="{ink}"/>')
        marks.append(_text(254 + 90 * n, 12, name))
    for n, (name, parts) in enumerate(bars):
        left, top = 330.0, 24 + 18 * n
        marks.append(_text(322, top + 10, name, anchor="end"))
        for seconds, (_, part, ink) in zip(parts, _PARTS, strict=True):
            width = 500 * seconds / longest
            title = f"<title>{part}: {seconds:.4g} s</title>"
            marks.append(f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="13" fill="{ink}">{title}</rect>')
            left += width
    return "".join(marks)


def _ink(number: int) -> str:
    return _INKS[number % len(_INKS)]


def _moved(marks: str, x: float, y: float) -> str:
    return f'<g transform="translate({x},{y})">{marks}</g>'


def _line(x1: float, y1: float, x2: float, y2: float, ink: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{ink}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", ink: str = "#333333", size: int = 11) -> str:
    words = escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}" font-size="{size}">{words}</text>'

"""The accuracy benchmark's table and plot, from its JSON alone."""

from __future__ import annotations

from typing import Any

from benchmarks.common import svg_marks as svg

_INKS = {
    "illava": "#1f6fb4",
    "attention_pruning": "#8e6bbf",
    "tome": "#2e8b57",
    "random": "#d1495b",
    "least_attended": "#b0708a",
    "illava-small": "#111111",
}
_WIDTH, _HEIGHT, _MARGIN, _COLUMNS = 250, 190, 34, 4


def text_table(plans: dict[str, Any]) -> str:
    """One Markdown row a plan, one column a task: exact match; behind it the difference and its 95 % interval."""
    tasks = list(next(iter(plans.values()))["tasks"])
    sizes = next(iter(plans.values()))["tasks"]
    heads = " | ".join(f"{task} (n = {sizes[task]['num_questions']:.0f})" for task in tasks)
    lines = [f"| plan | patches | LLM, pictures / clips | {heads} |", "|---" * (len(tasks) + 3) + "|"]
    for name, plan in plans.items():
        cells = [_cell(plan["tasks"][task], is_reference=name == "none") for task in tasks]
        share = f"{plan['last_layer_ratio']:.0%} / {plan['clip_last_layer_ratio']:.0%}"
        lines.append(f"| {name} | {plan['patches_kept']:.0%} | {share} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scope_notes(result: dict[str, Any]) -> list[str]:
    """What the rows of a comparison of methods are, and which methods have none, and why."""
    left_out = [f"- `{kind}` is not among them: {reason}." for kind, reason in result.get("left_out", {}).items()]
    return [*(f"- {sentence}" for sentence in result.get("compared", [])), *left_out]


SHOWN_TASKS = ("scene", "small", "chart", "document", "direction", "video", "easy_vqa", "caption")


def short_table(result: dict[str, Any]) -> str:
    """For the README: a row a plan, a column a task that counts; exact match in per cent, difference and interval."""
    plans = result["plans"]
    tasks = [task for task in SHOWN_TASKS if task in plans["none"]["tasks"]]
    heads = (f"{task} ({plans['none']['tasks'][task]['num_questions']:.0f})" for task in tasks)
    lines = [f"| plan | patches | LLM, pictures / clips | {' | '.join(heads)} |", "|---" * (len(tasks) + 3) + "|"]
    for name, plan in plans.items():
        share = f"{plan['last_layer_ratio']:.0%} / {plan['clip_last_layer_ratio']:.0%}"
        cells = (_short_cell(plan["tasks"][task], is_reference=name == "none") for task in tasks)
        shown = name.removeprefix("compare:")
        lines.append(f"| {shown} | {plan['patches_kept']:.0%} | {share} | {' | '.join(cells)} |")
    notes = scope_notes(result)
    return "\n".join([*lines, "", *notes] if notes else lines)


def _short_cell(task: dict[str, float], *, is_reference: bool) -> str:
    percent = {name: 100 * value for name, value in task.items()}
    if is_reference:
        return f"**{percent['accuracy']:.1f}** [{percent['low']:.1f}, {percent['high']:.1f}]"
    return f"{percent['difference']:+.1f} [{percent['difference_low']:+.1f}, {percent['difference_high']:+.1f}]"


def _cell(task: dict[str, float], *, is_reference: bool) -> str:
    if is_reference:
        return f"{task['accuracy']:.3f} [{task['low']:.3f}, {task['high']:.3f}]"
    interval = f"{task['difference_low']:+.3f}, {task['difference_high']:+.3f}"
    return f"{task['accuracy']:.3f} ({task['difference']:+.3f} [{interval}], -{task['lost']:.0f} +{task['won']:.0f})"


def svg_plot(plans: dict[str, Any]) -> str:
    """A panel a task: exact match against the share of patches that leave the tower, a line a method, intervals."""
    tasks = list(next(iter(plans.values()))["tasks"])
    num_rows = -(-len(tasks) // _COLUMNS)
    marks = []
    for number, task in enumerate(tasks):
        row, column = divmod(number, _COLUMNS)
        marks.append(f'<g transform="translate({column * _WIDTH},{row * _HEIGHT})">{_panel(task, plans)}</g>')
    for place, (method, ink) in enumerate(_INKS.items()):
        marks.append(svg.text(_MARGIN + 130 * place, num_rows * _HEIGHT + 14, method, ink=ink))
    marks.append(svg.text(_MARGIN + 130 * len(_INKS), num_rows * _HEIGHT + 14, "patches kept; own toy model"))
    return svg.drawing(_COLUMNS * _WIDTH, num_rows * _HEIGHT + 24, marks, font_px=10)


def _panel(task: str, plans: dict[str, Any]) -> str:
    marks = [svg.text(_WIDTH / 2, 14, task, anchor="middle", ink="#111111")]
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        marks.append(svg.line(_x(0), _y(part), _x(1), _y(part), "#dddddd"))
        marks.append(svg.text(_x(part), _y(0) + 12, f"{part:.0%}", anchor="middle"))
        marks.append(svg.text(_x(0) - 4, _y(part) + 3, f"{part:g}", anchor="end"))
    for method, ink in _INKS.items():
        own = [plan for name, plan in plans.items() if name.partition("@")[0].partition(":")[0] == method]
        if not own:
            continue
        if method != "illava-small":
            own.append(plans["none"])
        own.sort(key=lambda plan: plan["patches_kept"])
        points = [(plan["patches_kept"], plan["tasks"][task]) for plan in own]
        marks.append(svg.polyline([(_x(share), _y(row["accuracy"])) for share, row in points], ink))
        for share, row in points:
            marks.append(svg.line(_x(share), _y(row["low"]), _x(share), _y(row["high"]), ink))
            marks.append(
                f'<circle cx="{_x(share):.1f}" cy="{_y(row["accuracy"]):.1f}" r="2" fill="{ink}">'
                f"<title>{method} {share:.0%}: {row['accuracy']:.3f}</title></circle>"
            )
    return "".join(marks)


def _x(share: float) -> float:
    return _MARGIN + share * (_WIDTH - _MARGIN - 14)


def _y(accuracy: float) -> float:
    return _HEIGHT - _MARGIN + 8 - accuracy * (_HEIGHT - _MARGIN - 16)

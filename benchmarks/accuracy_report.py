"""The accuracy benchmark's table and plot, from its JSON alone."""

from __future__ import annotations

from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 640, 360, 48
_INKS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8e6bbf", "#e08e2b", "#444444", "#b0708a", "#5aa9a3")


def text_table(plans: dict[str, Any]) -> str:
    """One Markdown row a plan, one column a task: exact match, then the difference and its 95 % interval."""
    tasks = list(next(iter(plans.values()))["tasks"])
    lines = ["| plan | kept, pictures / clips | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 2) + "|"]
    for name, plan in plans.items():
        cells = [_cell(plan["tasks"][task], is_reference=name == "none") for task in tasks]
        lines.append(
            f"| {name} | {plan['kept_ratio']:.0%} / {plan['clip_kept_ratio']:.0%} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def _cell(task: dict[str, float], *, is_reference: bool) -> str:
    if is_reference:
        return f"{task['accuracy']:.3f} [{task['low']:.3f}, {task['high']:.3f}] n={task['num_questions']}"
    interval = f"{task['difference_low']:+.3f}, {task['difference_high']:+.3f}"
    return f"{task['accuracy']:.3f} ({task['difference']:+.3f} [{interval}], -{task['lost']} +{task['won']})"


def svg_plot(plans: dict[str, Any]) -> str:
    """Exact match against the share of tokens kept, one colour a task, with intervals."""
    tasks = list(next(iter(plans.values()))["tasks"])
    marks = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH + 130} {_HEIGHT}" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="white"/>'
    ]
    for tenth in range(0, 11, 2):
        marks.append(_text(_MARGIN - 6, _y(tenth / 10) + 4, f"{tenth / 10:.1f}", anchor="end"))
        marks.append(_text(_x(tenth / 10), _HEIGHT - _MARGIN + 16, f"{tenth * 10} %", anchor="middle"))
        marks.append(_line(_MARGIN, _y(tenth / 10), _WIDTH - 10, _y(tenth / 10), "#dddddd"))
    marks.append(_text(_WIDTH / 2, _HEIGHT - 8, "visual tokens kept (own toy model)", anchor="middle"))
    for number, task in enumerate(tasks):
        ink = _INKS[number % len(_INKS)]
        marks.append(_text(_WIDTH + 4, 24 + 16 * number, task, ink=ink))
        for name, plan in plans.items():
            x, row = (
                _x(plan["clip_kept_ratio" if task == "video" else "kept_ratio"]) + (number - len(tasks) / 2) * 1.5,
                plan["tasks"][task],
            )
            marks.append(_line(x, _y(row["low"]), x, _y(row["high"]), ink))
            marks.append(
                f'<circle cx="{x:.1f}" cy="{_y(row["accuracy"]):.1f}" r="3" fill="{ink}">'
                f"<title>{name}, {task}: {row['accuracy']:.3f}</title></circle>"
            )
    return "\n".join([*marks, "</svg>"]) + "\n"


def _x(share: float) -> float:
    return _MARGIN + share * (_WIDTH - _MARGIN - 20)


def _y(accuracy: float) -> float:
    return _HEIGHT - _MARGIN - accuracy * (_HEIGHT - 2 * _MARGIN)


def _line(x1: float, y1: float, x2: float, y2: float, ink: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{ink}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", ink: str = "#333333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}">{text}</text>'

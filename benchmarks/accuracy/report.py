"""Makes the accuracy benchmark's table and plot from its JSON alone."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.sweep.svg import plot_style, svg_of

_INKS = {
    "illava": "#1f6fb4",
    "attention_pruning": "#8e6bbf",
    "tome": "#2e8b57",
    "ward": "#c77c1e",
    "random": "#d1495b",
    "least_attended": "#b0708a",
    "illava-small": "#111111",
}
_COLUMNS = 4


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
    with plot_style():
        figure = Figure(figsize=(10, 2 * num_rows + 0.4), layout="constrained")
        panels = list(figure.subplots(num_rows, _COLUMNS, squeeze=False, sharey=True).flat)
        for panel in panels[len(tasks) :]:
            panel.remove()
        for task, panel in zip(tasks, panels, strict=False):
            _draw_panel(panel, task, plans)
        marks, names = panels[0].get_legend_handles_labels()
        figure.suptitle("exact match against the share of patches kept; own tiny demo model", fontsize=10)
        figure.legend(marks, names, loc="outside lower center", ncols=len(names))
        return svg_of(figure)


def _draw_panel(panel: Axes, task: str, plans: dict[str, Any]) -> None:
    for method, ink in _INKS.items():
        own = [plan for name, plan in plans.items() if name.partition("@")[0].partition(":")[0] == method]
        if not own:
            continue
        if method != "illava-small":
            own.append(plans["none"])
        own.sort(key=lambda plan: plan["patches_kept"])
        shares, rows = [plan["patches_kept"] for plan in own], [plan["tasks"][task] for plan in own]
        accuracies, joined = [row["accuracy"] for row in rows], "" if method == "illava-small" else "-"  # two plans
        panel.plot(shares, accuracies, color=ink, linestyle=joined, marker="o", markersize=3, label=method)
        panel.vlines(shares, [row["low"] for row in rows], [row["high"] for row in rows], color=ink, linewidth=1)
    panel.set(title=task, xlim=(0, 1.05), ylim=(0, 1.05))
    panel.xaxis.set_major_formatter(PercentFormatter(1))

"""Turns a training's log into a result file, a picture and a table: exact match on validation seeds over minutes.

    python -m benchmarks.toy_model.training.curve --log runs/toy/log.jsonl --json benchmarks/results/toy_training.json
    \\
        --svg benchmarks/results/toy_training.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common.machine import write_json
from pipeline.sweep.svg import INKS, plot_style, svg_of

SHOWN = (
    "scene_where", "scene_colour", "small_colour", "chart_value", "document_value", "document_key", "document_exists",
    "document_line", "video_direction", "caption_image",
)  # fmt: skip
_COLUMNS = 10


def read_log(path: Path) -> dict[str, Any]:
    """Budget, steps and validations of a log that `train` wrote.

    Raises:
        ValueError: it holds no validation.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = [record for record in records if "validation" in record]
    if not found:
        raise ValueError(f"{path} holds no validation yet: let the training reach its first (--eval-s)")
    return {
        "steps": found[-1]["step"],
        "minutes_a_process": found[-1]["minutes"],
        "resumed_at": [record["resumed_at"] for record in records if "resumed_at" in record],
        "validations": [
            {"step": one["step"], "minutes": one["minutes"], "exact_match": one["validation"]} for one in found
        ],
    }


def table(result: dict[str, Any]) -> str:
    """A row a task, a column for each of about ten of the validations."""
    every = -(-len(result["validations"]) // _COLUMNS)
    shown = result["validations"][::-1][::every][::-1]  # the last is always among them
    rows = [("minutes", [f"{one['minutes']:.0f}" for one in shown])]
    rows += [(task.replace("_", ": ", 1), [f"{one['exact_match'][task]:.2f}" for one in shown]) for task in SHOWN]
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    return "\n".join([lines[0], "|---" * (len(shown) + 1) + "|", *lines[1:]])


def svg_plot(result: dict[str, Any]) -> str:
    """A line a task."""
    minutes = [one["minutes"] for one in result["validations"]]
    with plot_style():
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        panel = figure.subplots()
        for task, ink in zip(SHOWN, INKS, strict=True):
            values = [one["exact_match"][task] for one in result["validations"]]
            panel.plot(minutes, values, color=ink, label=task, marker="o" if len(minutes) == 1 else "")
        panel.set(xlabel="minutes a process", ylabel="exact match", ylim=(0, 1.02))
        panel.set_xlim(left=0)
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return svg_of(figure)


def main() -> None:
    """Read the log; print the table; write the files that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="log.jsonl of the training's --work-dir")
    parser.add_argument("--command", default="", help="the training's command, for the result file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    try:
        result = read_log(args.log)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(table(result))
    if args.json:
        write_json(args.json, {"benchmark": "toy_training", "command": args.command, **result})
    if args.svg:
        args.svg.write_text(svg_plot(result))


if __name__ == "__main__":
    main()

"""Generates README's tables from benchmarks/results/*.json, between the markers that name them.

    python benchmarks/readme_tables.py --write     # put them into README.md
    python benchmarks/readme_tables.py --check     # exit 1 where README.md is behind the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def speed_table() -> str:
    """Ratios of tower and prefill time, one row a measured setting."""
    lines = [
        "| model shapes (random weights) | preset, layout | frames | dtype | tower | prefill | empty plan vs stock: "
        "tower | prefill | machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in _results("reduction_speed"):
        setting, ratio, machine = result["setting"], result["ratios"], result["machine"]
        where = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
        lines.append(
            f"| {setting['size']} | {setting['preset']}, {setting['layout']} | {setting['frames']} | {setting['dtype']} "
            f"| **{ratio['tower_plan_speedup']:.2f}x** | **{ratio['prefill_plan_speedup']:.2f}x** "
            f"| {ratio['tower_empty_vs_stock']:.2f}x | {ratio['prefill_empty_vs_stock']:.2f}x | {where} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"speed": speed_table}


def _results(benchmark: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [result for result in found if result["benchmark"] == benchmark]


def rendered(readme: str) -> str:
    """The README with every marked table made anew."""
    for name, table in TABLES.items():
        marked = re.compile(rf"(<!-- table:{name} -->\n).*?(\n<!-- end:{name} -->)", re.DOTALL)
        readme, count = marked.subn(lambda found, text=table(): found[1] + text + found[2], readme)
        if count != 1:
            raise SystemExit(f"README.md: expected one table marked {name!r}, found {count}")
    return readme


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = ROOT / "README.md"
    before, after = path.read_text(), rendered(path.read_text())
    if args.write:
        path.write_text(after)
    elif before != after:
        sys.exit("README.md's tables are behind benchmarks/results/: run python benchmarks/readme_tables.py --write")


if __name__ == "__main__":
    main()

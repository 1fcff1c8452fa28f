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
from statistics import median
from tempfile import TemporaryDirectory
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
        tower, prefill = (
            f"{ratio[key]:.2f}x" if key in ratio else "" for key in ("tower_empty_vs_stock", "prefill_empty_vs_stock")
        )
        lines.append(
            f"| {setting['size']} | {setting['preset']}, {setting['layout']} | {setting['frames']} "
            f"| {setting['dtype']} "
            f"| **{ratio['tower_plan_speedup']:.2f}x** | **{ratio['prefill_plan_speedup']:.2f}x** "
            f"| {tower} | {prefill} | {where} |"
        )
    return "\n".join(lines)


def family_speed_table() -> str:
    """The same ratios for other families, at true tower shapes."""
    lines = [
        "| tower (random weights) | preset | patches | visual tokens at the LLM's first, last layer | tower | prefill "
        "| empty plan vs stock: tower | prefill | decoder | machine |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in _results("family_speed"):
        setting, ratio, machine = result["setting"], result["ratios"], result["machine"]
        empty, plan = result["median"]["empty"], result["median"]["plan"]
        where = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
        lines.append(
            f"| {setting['size']} | {setting['preset']}, {setting['layout']} | {empty['patches']:.0f} "
            f"| {empty['vision_tokens_kept']:.0f} -> {plan['vision_tokens_kept']:.0f}, "
            f"{plan['decoder_tokens_kept']:.0f} "
            f"| **{ratio['tower_plan_speedup']:.2f}x** | **{ratio['prefill_plan_speedup']:.2f}x** "
            f"| {ratio['tower_empty_vs_stock']:.2f}x | {ratio['prefill_empty_vs_stock']:.2f}x "
            f"| {setting['decoder_layers']} layers, {setting['decoder_narrower_by']} times narrower "
            f"| {where}, {setting['dtype']}, {setting['rounds']} rounds |"
        )
    return "\n".join(lines)


def engine_table() -> str:
    """The engine against stock `generate`, one row a cell and comparison: median ratio, range of the rounds."""
    lines = [
        "| model shapes (random weights) | clips x frames | what against what | tower | prefill | decode step "
        "| end to end | machine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    words = {
        "empty_vs_stock": "no merging against stock",
        "plan_vs_stock": "{} against stock",
        "plan_vs_empty": "{} against no merging",
    }
    for result in _results("engine_vs_transformers"):
        setting, machine = result["setting"], result["machine"]
        where = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
        whole = [(cell, f"{setting['rounds']} rounds") for cell in result["cells"]]
        alone = [(cell, f"{setting['decode_rounds']} rounds, steps alone") for cell in result["decode_cells"]]
        for cell, rounds in whole + alone:
            for name, said in words.items():
                ratio = cell["ratios"][name]
                by_stage = ratio if "tower" in ratio else {"decode": ratio}
                stages = " | ".join(_ratio(by_stage.get(stage)) for stage in ("tower", "prefill", "decode", "total"))
                lines.append(
                    f"| {setting['size']}, {setting['dtype']} | {cell['batch']} x {cell['frames']} "
                    f"| {said.format(setting['preset'])} | {stages} | {where}, {rounds} |"
                )
    return "\n".join(lines)


def _ratio(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['median']:.2f}x ({found['min']:.2f} to {found['max']:.2f})"


def methods_table() -> str:
    """One row a registered reducer: its first docstring line, where it runs, its source."""
    sys.path.insert(0, str(ROOT))
    from illava.reducers import REDUCERS

    lines = ["| `kind` | what it does | runs at | source |", "|---|---|---|---|"]
    for kind, reducer in REDUCERS.items():
        said = reducer.__doc__ or ""
        source = _source(said) or _source(sys.modules[reducer.__module__].__doc__ or "")
        lines.append(f"| `{kind}` | {said.strip().splitlines()[0]} | {_runs_at(kind, reducer)} | {source} |")
    return "\n".join(lines)


def _source(docstring: str) -> str:
    """The papers and repositories a docstring names, without the remarks behind them."""
    found = re.search(r"Source: (.*?)(?:\n\s*\n|\Z)", docstring, re.DOTALL)
    text = " ".join(found[1].split()) if found else ""
    return re.split(r"\.? (?:Written|Deviation)|, written|, which gives| \(read|\. ", text)[0].rstrip(". ")


def _runs_at(kind: str, reducer: Any) -> str:
    """Stages whose evidence the LLaVA towers or the decoder measure today."""
    from benchmarks.family_matrix import SETTINGS
    from illava.decoder_reduction import DECODER_EVIDENCE
    from illava.vision import CLS_EVIDENCE

    method = reducer(**SETTINGS[kind])
    measured = {**CLS_EVIDENCE, **DECODER_EVIDENCE}
    places = ["media"] if "media" in reducer.stages else []  # its evidence: pixels
    places += [stage for stage in measured if stage in reducer.stages and method.evidence(stage) <= measured[stage]]
    return ", ".join(places) or "not wired yet: refused in words"


def family_table() -> str:
    """Methods x families: the stages each family's `check` accepts, which tests/illava/test_family_matrix.py runs."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.family_matrix import MAKERS, SETTINGS, cell_of, make_folder
    from illava.families import load_family

    families = {}
    with TemporaryDirectory() as folder:
        for name in MAKERS:
            model = make_folder(name, Path(folder, name))
            families[name] = load_family(str(model), dtype=torch.float32, device="cpu")
    lines = [f"| method | {' | '.join(families)} |", "|---" * (1 + len(families)) + "|"]
    for row, setting in SETTINGS.items():
        lines.append(f"| {row} | {' | '.join(cell_of(family, setting) for family in families.values())} |")
    return "\n".join(lines)


def overhead_table() -> str:
    """What one step costs beside the unreduced tower, method by method, the cheapest first."""
    lines = [
        "| method | choosing and merging, share of the tower's time | measuring attention received | "
        "choosing, x iLLaVA's | tokens kept | machine |",
        "|---|---|---|---|---|---|",
    ]
    for result in _results("reducer_overhead"):
        total, machine = result["segments"] * result["tokens_per_segment"], result["machine"]
        where = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} threads"
        for name, row in sorted(result["methods"].items(), key=lambda item: item[1]["tower_share"]):
            score = f"{100 * row['score_share']:.1f} %" if row["score_share"] else "-"
            lines.append(
                f"| {name} | {100 * row['tower_share']:.2f} % | {score} | {row['select_ratio']:.2f}x "
                f"| {row['tokens_kept']} of {total} | {where} |"
            )
    return "\n".join(lines)


def pipeline_table() -> str:
    """What the pipeline costs beside a model that costs nothing."""
    lines = ["| measured | result | machine |", "|---|---|---|"]
    for result in _results("pipeline_overhead"):
        machine, plan = result["machine"], result["plan"]
        where = f"{machine['cpu']}, {machine['cores']} cores"
        for run in result["runs"]:
            slope = run["driver_bytes_per_10k_items"]
            memory = f"; driver memory {slope / 2**20:+.2f} MiB per 10,000 items" if slope is not None else ""
            lines.append(
                f"| {run['num_items']:,} items through Ray | **{run['items_per_s']:.0f} items/s**, "
                f"{run['driver_cpu_ms_per_item']:.1f} ms of the driver's CPU each{memory} "
                f"| {where}, load {run['load_average']:.0f} |"
            )
        lines.append(f"| a manifest of {plan['num_items']:,} rows planned | **{plan['cpu_s']:.1f} s** CPU | {where} |")
    return "\n".join(lines)


def ray_data_table() -> str:
    """The same job through this pipeline and through Ray Data; then with one file that is no video."""
    said = {
        "ours": "this pipeline",
        "ray_data": "Ray Data",
        "ray_data_errors_allowed": "Ray Data, `max_errored_blocks=-1`",
    }
    lines = [
        "| one job on two cores | items/s, start of actors included | from the first file to the last "
        "| with one bad file: ended as | rows written | the bad file's row |",
        "|---|---|---|---|---|---|",
    ]
    for result in _results("ray_data_baseline"):
        for name, words in said.items():
            bad = result["bad_item"][name]
            rates = [result[key].get(name) for key in ("items_per_s", "steady_items_per_s")]
            shown = " | ".join(f"{median(values):.2f}" if values else "-" for values in rates)
            lines.append(
                f"| {words} | {shown} | {bad['ended']} | {bad['num_rows']} of {result['bad_item']['num_items']} "
                f"| {bad['bad_item']} |"
            )
    return "\n".join(lines)


def accuracy_table() -> str:
    """What the toy's answers keep, on the whole frozen set."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.accuracy_report import short_table

    (result,) = (found for found in _results("accuracy") if not _compares(found))
    return short_table(result)


def _compares(result: dict[str, Any]) -> bool:
    """Whether an accuracy result is the comparison of all methods."""
    return any(name.startswith("compare:") for name in result["plans"])


def compared_table() -> str:
    """Every method at equal kept tokens, on the frozen set."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.accuracy_report import short_table

    (result,) = (found for found in _results("accuracy") if _compares(found))
    return short_table(result)


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed_table,
    "family-speed": family_speed_table,
    "methods": methods_table,
    "families": family_table,
    "reducer-overhead": overhead_table,
    "pipeline": pipeline_table,
    "ray-data": ray_data_table,
    "accuracy": accuracy_table,
    "compared": compared_table,
}


def _results(benchmark: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [result for result in found if result["benchmark"] == benchmark]


def rendered(readme: str) -> str:
    """The README with every marked table made anew."""
    for name, table in TABLES.items():
        marked = re.compile(rf"(<!-- table:{name} -->\n).*?(\n<!-- end:{name} -->)", re.DOTALL)
        made = table()
        readme, count = marked.subn(lambda found, text=made: found[1] + text + found[2], readme)
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

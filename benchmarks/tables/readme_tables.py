"""Generates the tables of docs/ and README from benchmarks/results/*.json and the code, between their markers.

python benchmarks/tables/readme_tables.py --write     # put them into the pages
python benchmarks/tables/readme_tables.py --check     # exit 1 where a page is behind the results
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.common.result_files import results  # noqa: E402
from benchmarks.tables.accuracy_tables import (  # noqa: E402
    accuracy_table,
    agreement_table,
    compared_table,
    leads_table,
    presets_table,
)
from benchmarks.tables.reader_tables import capacity_table, frame_budgets_table, waits_table  # noqa: E402
from benchmarks.tables.speed_tables import (  # noqa: E402
    device_of,
    engine_table,
    family_speed_table,
    grammar_table,
    pipeline_table,
    quantization_table,
    ray_data_table,
    readers_table,
    speed_table,
    summary_table,
    vllm_table,
)


def methods_table() -> str:
    """One row a registered reducer: its first docstring line, where it runs, its source."""
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
    from benchmarks.tables.family_matrix import SETTINGS
    from illava.reduction.evidence import CLS_EVIDENCE, DECODER_EVIDENCE

    method = reducer(**SETTINGS[kind])
    measured = {**CLS_EVIDENCE, **DECODER_EVIDENCE}
    places = ["media"] if "media" in reducer.stages else []  # its evidence: pixels
    places += [stage for stage in measured if stage in reducer.stages and method.evidence(stage) <= measured[stage]]
    return ", ".join(places) or "not wired yet: refused in words"


def family_table() -> str:
    """Methods x families: the stages each family's `check` accepts, which tests/illava/families/test_family_matrix.py
    runs.
    """
    import torch

    from benchmarks.tables.family_matrix import SETTINGS, cell_of
    from illava.families import load_family
    from tests.support.models.families import MAKERS, make_folder

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
    for result in results("reducer_overhead"):
        total, machine = result["segments"] * result["tokens_per_segment"], result["machine"]
        where = device_of(machine)
        for name, row in sorted(result["methods"].items(), key=lambda item: item[1]["tower_share"]):
            score = f"{100 * row['score_share']:.1f} %" if row["score_share"] else "-"
            lines.append(
                f"| {name} | {100 * row['tower_share']:.2f} % | {score} | {row['select_ratio']:.2f}x "
                f"| {row['tokens_kept']} of {total} | {where} |"
            )
    return "\n".join(lines)


def methods_list() -> str:
    """One line a method that the next release still has: its name, what it does, its paper."""
    from illava.reducers import REDUCERS

    lines = []
    for kind, reducer in REDUCERS.items():
        if reducer.deprecated:
            continue
        said = reducer.__doc__ or ""
        first = re.sub(r"``(.+?)``", r"`\1`", said.strip().splitlines()[0])
        source = _source(said) or _source(sys.modules[reducer.__module__].__doc__ or "")
        papers = re.findall(r"arXiv (\d{4}\.\d{5})", source)
        is_ours = re.match(r"(a baseline of )?ours\b", source) is not None or not papers
        paper = " (ours)" if is_ours else f" ([{papers[0]}](https://arxiv.org/abs/{papers[0]}))"
        lines.append(f"- `{kind}`: {first}{paper}")
    return "\n".join(lines)


Tables = dict[str, Callable[[], str]]
PAGES: dict[str, Tables] = {
    "README.md": {"presets": presets_table, "summary": summary_table, "method-list": methods_list},
    "docs/plans-and-methods.md": {"methods": methods_table, "families": family_table},
    "docs/benchmarks.md": {
        "speed": speed_table,
        "family-speed": family_speed_table,
        "engine": engine_table,
        "vllm": vllm_table,
        "readers": readers_table,
        "accuracy": accuracy_table,
        "leads": leads_table,
        "compared": compared_table,
        "agreement": agreement_table,
        "frame-budgets": frame_budgets_table,
        "reducer-overhead": overhead_table,
        "grammar": grammar_table,
        "quantization": quantization_table,
        "pipeline": pipeline_table,
        "ray-data": ray_data_table,
    },
    "docs/cost-and-capacity.md": {"capacity": capacity_table, "waits": waits_table},
}


def rendered(page: str, text: str, *, without: Collection[str] = ()) -> str:
    """A page with its marked tables made anew.

    Args:
        page: a key of `PAGES`.
        text: what it holds.
        without: tables that are left as they are.
    """
    for name, table in PAGES[page].items():
        if name in without:
            continue
        marked = re.compile(rf"(<!-- table:{name} -->\n).*?(\n<!-- end:{name} -->)", re.DOTALL)
        made = table()
        text, count = marked.subn(lambda found, made=made: found[1] + made + found[2], text)
        if count != 1:
            raise SystemExit(f"{page}: expected one table marked {name!r}, found {count}")
    return text


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    args = parser.parse_args()
    behind = []
    for page in PAGES:
        path = ROOT / page
        before = path.read_text("utf-8")
        after = rendered(page, before)
        if before != after:
            behind.append(page)
            if args.write:
                path.write_text(after, "utf-8")
    if args.check and behind:
        sys.exit(
            f"{', '.join(behind)}: tables are behind benchmarks/results/ or the code: run python "
            "benchmarks/tables/readme_tables.py --write"
        )


if __name__ == "__main__":
    main()

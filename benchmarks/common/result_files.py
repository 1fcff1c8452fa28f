"""What the benchmarks wrote: benchmarks/results/*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


def results(benchmark: str) -> list[dict[str, Any]]:
    """Every result file of one benchmark, by file name."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    return [result for result in found if result["benchmark"] == benchmark]

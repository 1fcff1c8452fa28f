"""Measures the pipeline with a model that costs nothing: items/s through Ray, driver memory, manifest planning.

python benchmarks/throughput/pipeline_overhead.py --json benchmarks/results/pipeline_overhead_cpu.json

Manifest, scheduler, Ray actors, sink and finish are the real ones, with all guarantees on. The rate is from the first
published part to the last; ``wall_s`` includes starting Ray and the actors. Memory is the driver's own (resident less
shared); its slope is a line through all samples after the first tenth of the run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from bisect import bisect
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.common.machine import write_json  # noqa: E402
from benchmarks.throughput.null_model import null_job, null_loader, null_worker  # noqa: E402
from pipeline.execution.runner import run_job  # noqa: E402
from pipeline.runs.run import open_run, pending_shards  # noqa: E402

SAMPLE_EVERY_S = 0.25
FEWEST_FOR_A_SLOPE = 10_000  # below, a growth by caches that fill once looks like a leak
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class MemorySamples:
    """Samples this process's own memory while a block runs: pairs of wall-clock second and bytes."""

    samples: list[tuple[float, int]] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> MemorySamples:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            self.samples.append((time.time(), own_bytes()))


def own_bytes() -> int:
    """Return the resident memory of this process that it does not share."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * _PAGE_BYTES


def slope_per_10k(samples: list[tuple[float, int]], published_s: list[float], items_per_part: int) -> float:
    """Return bytes of growth per 10,000 items by a least-squares line, without the first tenth.

    Args:
        samples: pairs of second and bytes.
        published_s: when each part was published, ascending.
        items_per_part: items in each part.
    """
    done = [(bisect(published_s, at_s) * items_per_part, num_bytes) for at_s, num_bytes in samples]
    begin = len(published_s) * items_per_part / 10
    steady = [(items, num_bytes) for items, num_bytes in done if items >= begin]
    if len({items for items, _ in steady}) < 2:
        raise SystemExit("too few samples for a slope: run more items")
    items, num_bytes = np.array(steady, float).T
    return float(np.polyfit(items, num_bytes, 1)[0] * 10_000)


def run_null(num_items: int, folder: Path, *, num_readers: int) -> dict[str, Any]:
    """Play one run through Ray, and measure it."""
    config = null_job(folder, num_items, num_readers=num_readers)
    began_s, began_cpu_s = time.time(), time.process_time()
    with MemorySamples() as memory:
        summary = run_job(config, worker_factory=null_worker, loader_factory=null_loader)
    wall_s, cpu_s = time.time() - began_s, time.process_time() - began_cpu_s
    if summary.exit_code or summary.stats.num_rows != num_items:
        raise SystemExit(f"the run ended with {summary.exit_code} and {summary.stats.num_rows} rows of {num_items}")
    published_s = sorted(part.stat().st_mtime for part in Path(config.output.uri, "data").glob("part-*"))
    per_part = config.output.items_per_shard
    steady_s = published_s[-1] - published_s[0]
    return {
        "num_items": num_items,
        "items_per_s": (num_items - per_part) / steady_s,
        "wall_s": wall_s,
        "driver_cpu_ms_per_item": 1000 * cpu_s / num_items,
        "driver_bytes_at_end": memory.samples[-1][1],
        "driver_bytes_per_10k_items": slope_per_10k(memory.samples, published_s, per_part)
        if num_items >= FEWEST_FOR_A_SLOPE
        else None,
        "load_average": os.getloadavg()[0],
    }


def plan_null(num_items: int, folder: Path) -> dict[str, Any]:
    """Return CPU seconds from the configuration to the list of pending shards, writing the frozen manifest included."""
    config = null_job(folder, num_items)
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    pending = pending_shards(open_run(config))
    cpu_s, wall_s = time.process_time() - began_cpu_s, time.perf_counter() - began_s
    return {"num_items": num_items, "num_shards": len(pending), "cpu_s": cpu_s, "wall_s": wall_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 50_000])
    parser.add_argument("--planned", type=int, default=1_000_000)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="where to write the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for num_items in args.items:
            runs.append(run := run_null(num_items, Path(folder), num_readers=args.readers))
            print(run, flush=True)
        # A process of its own: a million rows must not count in the memory that is measured above.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            planned = pool.submit(plan_null, args.planned, Path(folder)).result()
        print(planned)
    if args.json:
        result = {"readers": args.readers, "runs": runs, "plan": planned}
        write_json(args.json, {"benchmark": "pipeline_overhead", **result})


if __name__ == "__main__":
    main()

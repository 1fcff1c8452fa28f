"""Measures all GPU figures in one run under nine minutes, without a network: LLaVA-OneVision-7B's shapes, bf16.

Random weights made on the device (they say nothing about quality), forced lengths, sides interleaved in one run,
medians and spread, CUDA events for stages. A wrong result ends the run. Each part has a budget of its own and the file
is written after each: what was stopped says so, and keeps the rounds it had. `goals` puts the measured figures beside
what is aimed at.

    python benchmarks/speed/gpu_all.py --json ~/gpu_all.json              # outside the tree, then copied by hand
    python benchmarks/speed/gpu_all.py --dry-run --json /tmp/dry.json     # every part on CPU, tiny; its figures mean
    nothing
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.device_clock import DeviceClock
from benchmarks.common.device_onevision import build_onevision
from benchmarks.common.machine import write_json
from benchmarks.speed import gpu_parts
from benchmarks.speed.gpu_parts import Bench, Part
from illava import VLM, preset

DRY_TIMES = 10.0  # a dry run may take so many times as long: a CPU that others use too
TOTAL_S = 520.0  # with what is left for starting Python, under nine minutes
# (name, part, seconds): the budgets add up to less than the total, the rest is for building the model.
PARTS: tuple[tuple[str, Part, float], ...] = (
    ("correctness", gpu_parts.correctness, 80),
    ("ceilings", gpu_parts.machine_ceilings, 10),
    ("kernels", gpu_parts.kernels, 15),
    ("attention", gpu_parts.attention, 15),
    ("tower_graphs", gpu_parts.tower_graphs, 15),
    ("memory", gpu_parts.memory, 20),
    ("batch_1", gpu_parts.batch_of(1), 80),
    ("roofline", gpu_parts.roofline, 20),
    ("batch_8", gpu_parts.batch_of(8), 80),
    ("batch_32", gpu_parts.batch_of(32), 80),
    ("pipeline", gpu_parts.pipeline, 70),
)
# What is aimed at: (where it stands, at least or at most, bound).
GOALS: dict[str, tuple[str, str, float]] = {
    "tower under the plan": ("batch_1.speedup.plan_vs_empty.tower", ">=", 1.6),
    "time to first token under the plan": ("batch_1.speedup.plan_vs_empty.first_token", ">=", 2.2),
    "seconds of a decode step, batch 1": ("batch_1.seconds.empty.decode.median", "<=", 0.0045),
    "end to end, batch 8, against no merging": ("batch_8.speedup.plan_vs_empty.total", ">=", 1.75),
    "end to end, batch 8, against stock": ("batch_8.speedup.plan_vs_stock.total", ">=", 4.0),
    "never slower, batch 1": ("batch_1.speedup.plan_vs_empty.total", ">=", 1.0),
    "never slower, batch 8": ("batch_8.speedup.plan_vs_empty.total", ">=", 1.0),
    "never slower, batch 32": ("batch_32.speedup.plan_vs_empty.total", ">=", 1.0),
    "key/value bytes per item": ("memory.kv_ratio", "<=", 0.40),
    "largest batch": ("memory.largest_batch_ratio", ">=", 2.4),
    "GPU busy through the pipeline": ("pipeline.empty.pipeline.busy", ">=", 0.90),
    "pipeline's rate against the bare engine": ("pipeline.plan.pipeline_vs_bare", ">=", 0.95),
    "captions per hour": ("pipeline.plan.pipeline.captions_per_hour", ">=", 1800),
}


class OutOfTimeError(Exception):
    """A part's budget is spent."""


@contextmanager
def budget(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the block when its seconds are over."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"{seconds:.0f} s are over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(bench: Bench, part: Part, seconds: float) -> dict[str, Any]:
    """A part's result, and how it ended; what it holds of the engine is let go."""
    result: dict[str, Any] = {}
    started_s = time.monotonic()
    bench.ends_s = started_s + 0.9 * seconds  # rounds end by themselves; the alarm is for what does not
    status = "ok"
    try:
        with budget(seconds):
            part(bench, result)
    except OutOfTimeError as error:
        status = f"out of time: {error}"
    except Exception as error:  # one part's failure must not cost the others their figures
        status = f"failed: {type(error).__name__}: {error}"
        traceback.print_exc()
    bench.vlm.cancel_all()
    return {"status": status, "taken_s": round(time.monotonic() - started_s, 1), **result}


def run_all(
    bench: Bench,
    *,
    total_s: float,
    write: Callable[[dict[str, Any]], None],
    times: float = 1.0,
    wanted: Sequence[str] | None = None,
) -> dict[str, Any]:
    """All parts, or those wanted, as far as the time goes, each with so many times its budget.

    ``write`` is called after each. A part that found wrong results is the last.
    """
    parts: dict[str, Any] = {}
    started_s = time.monotonic()
    for name, part, seconds in PARTS:
        if wanted is not None and name not in wanted:
            continue
        left_s = total_s - (time.monotonic() - started_s)
        parts[name] = (
            run_part(bench, part, min(times * seconds, left_s)) if left_s > 1 else {"status": "not begun: no time"}
        )
        print(f"{name:11s} {parts[name]['status']} ({parts[name].get('taken_s', 0)} s)", flush=True)
        write(parts)
        if parts[name].get("missed"):
            print(f"ended: {name} says that results are wrong, so no figure would mean anything", flush=True)
            break
    return parts


def judged(parts: dict[str, Any]) -> dict[str, Any]:
    """Every goal with its figure, or open where there is none."""
    found = {}
    for name, (path, sense, bound) in GOALS.items():
        value: Any = parts
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        held = None if value is None else (value >= bound if sense == ">=" else value <= bound)
        found[name] = {"goal": f"{sense} {bound:g}", "measured": value, "held": "open" if held is None else held}
    return found


def build(args: argparse.Namespace) -> Bench:
    """The model on its device, and what the parts share."""
    dry = args.dry_run
    device = torch.device("cpu" if dry else "cuda")
    model, family, preprocessor = build_onevision(
        "tiny" if dry else "7b", device=device, dtype=torch.float32 if dry else torch.bfloat16
    )
    family.stop_token_ids = frozenset()  # every answer has the length asked for, through the pipeline too
    vlm = VLM(
        family,
        max_batch_requests=32,
        kv_cache_bytes=64 << 20 if dry else 16 << 30,  # 12 GiB are used; stock's prefill at batch 32 needs 50
        decode_graphs=False if args.eager else None,
    )
    clock = DeviceClock(device)
    name = "illava-small-video" if dry else "illava-video"
    return Bench(
        vlm=vlm, model=model, preprocessor=preprocessor, clock=clock,
        plan=preset(name, layout="geometric"), preset=name,
        num_frames=1 if dry else args.frames, new_tokens=3 if dry else 128, num_rounds=1 if dry else 20,
        num_jobs=2 if dry else 64,
    )  # fmt: skip


def main() -> None:
    """Build, measure part by part, print the goals, write."""
    started_s = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the result, rewritten after each part")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, as where capturing fails")
    parser.add_argument("--parts", nargs="+", choices=[name for name, *_ in PARTS], help="these alone; all by default")
    parser.add_argument("--dry-run", action="store_true", help="every part on CPU at tiny shapes")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run runs every part on CPU")
    bench = build(args)
    setting = {
        "dry_run": args.dry_run, "preset": bench.preset, "layout": "geometric", "frames": bench.num_frames,
        "new_tokens": bench.new_tokens, "clock": bench.clock.kind, **bench.vlm.backends,
    }  # fmt: skip

    def write(parts: dict[str, Any]) -> None:
        write_json(args.json, {"benchmark": "gpu_all", "setting": setting, "goals": judged(parts), "parts": parts})

    times = DRY_TIMES if args.dry_run else 1.0
    left_s = times * TOTAL_S - (time.monotonic() - started_s)
    parts = run_all(bench, total_s=left_s, write=write, times=times, wanted=args.parts)
    for name, goal in judged(parts).items():
        value = "open" if goal["measured"] is None else f"{goal['measured']:.4g}"
        print(f"{name:42s} {value:>10s}  goal {goal['goal']}")
    if any(part.get("missed") for part in parts.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

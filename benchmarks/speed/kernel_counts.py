"""Counts what one video asks of a GPU, without one: kernels, blocking copies and elementwise bytes, stage by stage.

LLaVA-OneVision-7B's true shapes in bfloat16, the engine itself, on `StandInCuda`; nothing is computed, so counts are
exact and the same on every machine. Each stage is counted at its first and at its second request of the same shapes;
what the second still copies, every request copies. A decode step is the one that CUDA graphs capture.

    python benchmarks/speed/kernel_counts.py --json benchmarks/results/kernel_counts_7b.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.device_onevision import build_onevision
from benchmarks.common.machine import write_json
from benchmarks.common.stand_in_cuda import StandInCuda, Work
from illava import VLM, Request, SamplingParams, VisualInput, preset
from illava.decoder import cuda_graphs
from illava.engine.sampling import draw_greedy
from illava.plan import EMPTY_PLAN, ReductionPlan


def _rotate_write_bytes(given: dict[str, Any]) -> int:
    """Queries, keys and values once, the rotated ones once, and keys and values in the cache."""
    q, k = given["q"].nbytes, given["k"].nbytes
    return 2 * q + 2 * k + 2 * given["cos"].nbytes + (3 * k if given["WRITE"] else 0)


TRITON_BYTES = {  # of the Triton kernels that are no attention
    "_add_norm": lambda given: (2 + 2 * given["HAS_DELTA"]) * given["x"].nbytes,
    "_rotate_write": _rotate_write_bytes,
    "_silu_mul": lambda given: 3 * given["out"].nbytes,
}
PROMPT = "describe the video in two sentences"


def stages(vlm: VLM, stand_in: StandInCuda, video: VisualInput, plan: ReductionPlan) -> dict[str, Work]:
    """What tower, prefill and the first decode step of one request ask for, its text and its pixels included."""
    engine, found = vlm.engine, {}
    engine.submit(Request("counted", (video, PROMPT), SamplingParams(max_new_tokens=4, min_new_tokens=4)), plan)
    with torch.inference_mode():
        for stage, run in (
            ("tower", engine._encode),
            ("prefill", engine._prefill),
            ("decode", lambda: engine.decode_phase.queue(engine._running)),
        ):
            with stand_in.recorded() as found[stage]:
                run()
    failed = [generation.error for generation in engine._finished if generation.error is not None]
    engine.cancel_all()
    if failed:
        raise failed[0]
    return found


def captured_step(vlm: VLM, stand_in: StandInCuda, *, batch: int) -> Work:
    """What a captured decode step of so many rows holds: its greedy draw, too."""
    decoder, embed = vlm.family.decoder, vlm.family.embed
    with mock.patch.object(cuda_graphs, "_Recorder"):
        graphs = cuda_graphs.DecodeGraphs(decoder, embed, vlm.engine.cache, draw=draw_greedy, max_batch=batch)
    with torch.inference_mode(), stand_in.recorded() as work:
        graphs._step(batch, biased=False)
    return work


def count(shape: str, *, frames: int, dtype: torch.dtype, plans: dict[str, ReductionPlan]) -> dict[str, Any]:
    """All stages under each plan, at a first and a second request; and the captured step."""
    model, family, preprocessor = build_onevision(shape, device=torch.device("meta"), dtype=dtype)
    with StandInCuda(triton_bytes=TRITON_BYTES) as stand_in:
        family = type(family)(stand_in.to_device(model), family._tokenizer, preprocessor)
        family.stop_token_ids = frozenset()
        vlm = VLM(family, kv_cache_bytes=16 << 30, decode_graphs=False)
        side = preprocessor.geometry.tile_px
        video = preprocessor.video(np.zeros((frames, side, side, 3), dtype=np.uint8))
        found: dict[str, Any] = {}
        for name, plan in plans.items():
            first, second = (stages(vlm, stand_in, video, plan) for _ in range(2))
            found[name] = {
                stage: {"first": first[stage].described(), "second": second[stage].described()} for stage in first
            }
        steps = {f"batch_{n}": captured_step(vlm, stand_in, batch=n).described() for n in (1, 8)}
    return {"plans": found, "captured_step": steps}


def main() -> None:
    """Count, print the totals, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    plan = preset("illava-small-video" if args.shape == "tiny" else "illava-video", layout="geometric")
    plans = {"empty": EMPTY_PLAN, "plan": plan}
    found = count(args.shape, frames=args.frames, dtype=getattr(torch, args.dtype), plans=plans)
    rows = [
        (f"{name} {stage} {turn}", work)
        for name, of_plan in found["plans"].items()
        for stage, turns in of_plan.items()
        for turn, work in turns.items()
    ]
    for name, work in [*rows, *(("captured step " + name, work) for name, work in found["captured_step"].items())]:
        totals = f"{work['kernels']:6d} kernels {work['blocking_copies']:4d} blocking {work['elementwise_gb']:9.3f} GB"
        print(f"{name:24s} {totals}")
    if args.json:
        setting = {"shape": args.shape, "frames": args.frames, "dtype": args.dtype, "layout": "geometric"}
        write_json(args.json, {"benchmark": "kernel_counts", "setting": setting, **found})


if __name__ == "__main__":
    main()

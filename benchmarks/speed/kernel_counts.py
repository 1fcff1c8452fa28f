"""Counts what one video asks of a GPU, without one: kernels, blocking copies and elementwise bytes, stage by stage.

LLaVA-OneVision-7B's true shapes in bfloat16, the engine itself, on `StandInCuda`; nothing is computed, so counts are
exact and the same on every machine. Each stage is counted at its first and at its second request of the same shapes;
what the second still copies, every request copies. A decode step is the one that CUDA graphs capture. Of a video that
waits behind another it is counted what was copied ahead of it, on a stream of its own.

    python benchmarks/speed/kernel_counts.py --json benchmarks/results/kernel_counts_7b.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.device_onevision import build_onevision
from benchmarks.common.machine import write_json
from benchmarks.common.stand_in_cuda import DEVICE, StandInCuda, Work
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
    "_greedy_split": lambda given: given["logits"].nbytes,
    "_greedy_join": lambda given: 4 * given["top"].nbytes,
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


def behind_another(vlm: VLM, stand_in: StandInCuda, videos: Sequence[VisualInput]) -> dict[str, int]:
    """Of two videos that wait: copies of the second's pixels while the first is encoded, and of its own encoding."""
    engine, copies = vlm.engine, []
    for n, video in enumerate(videos):
        engine.submit(Request(f"waits {n}", (video, PROMPT), SamplingParams(max_new_tokens=2)))
    for _ in videos:
        with torch.inference_mode(), stand_in.recorded() as work:
            engine._encode()
        copies.append(work)
    engine.cancel_all()
    first, second = copies
    return {
        "side_stream_copies": first.side_copies,
        "other_copies_of_first": first.copies - first.side_copies,
        "other_copies_of_second": second.copies,
        "blocking_copies": first.num_blocking + second.num_blocking,
    }


def captured_step(vlm: VLM, stand_in: StandInCuda, *, batch: int, biased: bool = False) -> Work:
    """What a captured decode step of so many rows holds, its greedy draw, too; with biases for ``size_bias`` plans."""
    decoder, embed = vlm.family.decoder, vlm.family.embed
    with mock.patch.object(cuda_graphs, "_Recorder"):
        graphs = cuda_graphs.DecodeGraphs(decoder, embed, vlm.engine.cache, draw=draw_greedy, max_batch=batch)
    with torch.inference_mode(), stand_in.recorded() as work:
        graphs._step(batch, biased=biased)
    return work


def count(shape: str, *, frames: int, dtype: torch.dtype, plans: dict[str, ReductionPlan]) -> dict[str, Any]:
    """All stages under each plan, at a first and a second request; and the captured step."""
    model, family, preprocessor = build_onevision(shape, device=torch.device("meta"), dtype=dtype)
    with StandInCuda(triton_bytes=TRITON_BYTES) as stand_in:
        family = type(family)(stand_in.to_device(model), family._tokenizer, preprocessor)
        family.stop_token_ids = frozenset()
        side, patches = preprocessor.geometry.tile_px, frames * preprocessor.geometry.grid**2
        vlm = VLM(family, kv_cache_bytes=16 << 30, decode_graphs=False, max_vision_patches=patches)
        video, other = (preprocessor.video(np.full((frames, side, side, 3), n, dtype=np.uint8)) for n in range(2))
        found: dict[str, Any] = {}
        for name, plan in plans.items():
            first, second = (stages(vlm, stand_in, video, plan) for _ in range(2))
            found[name] = {
                stage: {"first": first[stage].described(), "second": second[stage].described()} for stage in first
            }
        waiting = behind_another(vlm, stand_in, (video, other))
        steps = {f"batch_{n}": captured_step(vlm, stand_in, batch=n).described() for n in (1, 8)}
        vlm.engine.cache.write_bias(torch.arange(1, device=DEVICE), torch.ones(1, device=DEVICE))  # the pool of biases
        steps["batch_8_biased"] = captured_step(vlm, stand_in, batch=8, biased=True).described()
    return {"plans": found, "video_behind_another": waiting, "captured_step": steps}


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
    if args.shape == "7b":
        plans |= {name: preset(name, layout="geometric") for name in ("ward-video-50", "ward-video-25")}
    found = count(args.shape, frames=args.frames, dtype=getattr(torch, args.dtype), plans=plans)
    rows = [
        (f"{name} {stage} {turn}", work)
        for name, of_plan in found["plans"].items()
        for stage, turns in of_plan.items()
        for turn, work in turns.items()
    ]
    for name, work in [*rows, *(("captured step " + name, work) for name, work in found["captured_step"].items())]:
        totals = f"{work['kernels']:6d} kernels {work['blocking_copies']:4d} blocking {work['elementwise_gb']:9.3f} GB"
        print(f"{name:28s} {totals}")
    print(f"a video behind another: {found['video_behind_another']}")
    if args.json:
        setting = {"shape": args.shape, "frames": args.frames, "dtype": args.dtype, "layout": "geometric"}
        write_json(args.json, {"benchmark": "kernel_counts", "setting": setting, **found})


if __name__ == "__main__":
    main()

"""Compares tower, prefill and decode with what this machine can do: counted work over measured ceilings.

Ceilings are measured in the same run: the largest rate of one square matrix product, and of copying memory (bytes read
and written). Work is counted by torch (benchmarks/speed/flops.py); a decode step's bytes are its weights once and
every key and value once. The share is the time the ceiling would take, arithmetic or memory, over the time measured.

    python benchmarks/speed/roofline.py --shape tiny                                  # CPU, a quick look
    python benchmarks/speed/roofline.py --shape 7b --device cuda --dtype bfloat16 --frames 32 --json OUT.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.device_clock import DeviceClock, seconds_each, summary
from benchmarks.common.device_onevision import SHAPES, build_onevision
from benchmarks.common.machine import write_json
from benchmarks.speed.flops import decode_flops, prefill_flops, tower_flops
from illava import VLM, Request, SamplingParams, VisualInput, preset
from illava.engine.engine import Engine
from illava.families.llava.onevision import LlavaOnevision
from illava.plan import EMPTY_PLAN, ReductionPlan

PROMPT = "describe the video in two sentences"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine does at best: multiply-adds count two, a copied byte counts two."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage has to do at least."""

    flops: float
    num_bytes: float


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, side: int, copied_bytes: int) -> Ceilings:
    """One square product of ``side``, and a copy of so many bytes; the best of five rounds each."""
    clock = DeviceClock(device)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.float32).to(dtype).unbind()
    source = torch.empty(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = seconds_each(clock, lambda: a @ b, repeats=4, rounds=5)
    copy = seconds_each(clock, lambda: target.copy_(source), repeats=4, rounds=5)
    return Ceilings(2 * side**3 / product["min"], 2 * copied_bytes / copy["min"])


def tower_work(family: LlavaOnevision, num_frames: int, plan: ReductionPlan) -> Work:
    """Frames through tower and projector; weights are read once."""
    tower, counts = family.tower, [family.geometry.grid**2]
    for n in range(len(tower._blocks)):
        reducer = plan.at("vision_block", n)
        counts.append(counts[-1] if reducer is None else reducer.num_kept(counts[-1]))
    flops = tower_flops(family, num_frames, counts, scored=plan.layers("vision_block"))
    parts = [tower._embeddings.patch_embedding, family.encoder._projector]
    parts += [part for block in tower._blocks for part in (block.self_attn, block.mlp)]
    return Work(flops, num_weights(*parts) * family.decoder.dtype.itemsize)


def decoder_work(family: LlavaOnevision, lengths_LB: Sequence[Sequence[int]]) -> tuple[Work, Work]:
    """Prefill of prompts of these lengths by layer, and the first decode step after it."""
    decoder, itemsize = family.decoder, family.decoder.dtype.itemsize
    weights = num_weights(decoder.lm_head, *(part for x in decoder.layers for part in (x.self_attn, x.mlp)))
    held = 2 * decoder.num_kv_heads * decoder.head_dim * sum(map(sum, lengths_LB))
    num_bytes = (weights + held) * itemsize
    after = [[n + 1 for n in lengths] for lengths in lengths_LB]
    return Work(prefill_flops(decoder, lengths_LB), num_bytes), Work(decode_flops(decoder, after), num_bytes)


def num_weights(*modules: torch.nn.Module) -> int:
    """Entries of the modules' matrices and convolutions."""
    return sum(weight.numel() for module in modules for weight in module.parameters() if weight.dim() > 1)


def share(work: Work, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """The part of the measured time that the nearer ceiling explains."""
    by_flops, by_bytes = work.flops / ceilings.flops_per_s, work.num_bytes / ceilings.bytes_per_s
    ideal_s, bound = max((by_flops, "arithmetic"), (by_bytes, "memory"))
    return {**asdict(work), "seconds": seconds, "ideal_s": ideal_s, "bound": bound, "share": ideal_s / seconds}


def stages_of_one(engine: Engine, video: VisualInput, plan: ReductionPlan, *, new_tokens: int) -> dict[str, Any]:
    """One request alone: seconds of tower, prefill and a decode step, and the tokens it holds in each layer."""
    sampling = SamplingParams(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    engine.submit(Request("one", (video, PROMPT), sampling), plan)
    lengths: list[int] = []
    while engine.has_work:
        done = engine.step()
        lengths = lengths or next(list(state.lengths) for state in engine._running)
    if done[0].error is not None:
        raise done[0].error
    timing = done[0].timing
    decode_s = timing.decode_s / (new_tokens - 1)
    return {"tower": timing.vision_s, "prefill": timing.prefill_s, "decode": decode_s, "lengths": lengths}


def measure(
    engine: Engine, video: VisualInput, plans: dict[str, ReductionPlan], ceilings: Ceilings, *, rounds: int
) -> dict[str, Any]:
    """Shares of each plan's stages, plans interleaved, medians; the first round warms up."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in plans}
    for _ in range(rounds + 1):
        for name, plan in plans.items():
            seen[name].append(stages_of_one(engine, video, plan, new_tokens=5))
    found: dict[str, Any] = {}
    for name, plan in plans.items():
        prefill, decode = decoder_work(engine.family, [[n] for n in seen[name][-1]["lengths"]])
        work = {"tower": tower_work(engine.family, len(video.tiles), plan), "prefill": prefill, "decode": decode}
        median = {stage: summary([one[stage] for one in seen[name][1:]])["median"] for stage in work}
        found[name] = {stage: share(work[stage], median[stage], ceilings) for stage in work}
    return found


def default_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Sizes that fill the device and take well under a second."""
    if device.type == "cuda":
        return measure_ceilings(device, dtype, side=8192, copied_bytes=2 << 30)
    return measure_ceilings(device, dtype, side=512, copied_bytes=64 << 20)


def main() -> None:
    """Build the model on the device, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    ceilings = default_ceilings(device, dtype)
    _, family, preprocessor = build_onevision(args.shape, device=device, dtype=dtype)
    vlm = VLM(family, max_batch_requests=1)
    engine = Engine(family, vlm.engine.cache, vlm.engine.config, now=DeviceClock(device), graphs=vlm.engine.graphs)
    side = preprocessor.geometry.tile_px
    video = preprocessor.video(np.random.default_rng(0).integers(0, 256, (args.frames, side, side, 3), dtype=np.uint8))
    plan = preset("illava-small-video" if args.shape == "tiny" else "illava-video", layout="geometric")
    found = measure(engine, video, {"empty": EMPTY_PLAN, "plan": plan}, ceilings, rounds=args.rounds)
    for name, stages in found.items():
        for stage, one in stages.items():
            print(f"{name:6s} {stage:8s} {one['share']:6.1%} of the {one['bound']} ceiling")
    if args.json:
        setting = {key: getattr(args, key) for key in ("shape", "device", "dtype", "frames", "rounds")}
        result = {"setting": setting | vlm.backends, "ceilings": asdict(ceilings), "plans": found}
        write_json(args.json, {"benchmark": "roofline", **result})


if __name__ == "__main__":
    main()

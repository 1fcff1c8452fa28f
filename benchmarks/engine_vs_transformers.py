"""The engine against stock transformers `generate`: tower, prefill, decode per step and end to end, by batch size.

Same weights, same clips, same prompt ids, same forced number of new tokens. Three sides, interleaved in one run: stock
`generate` (SDPA attention), the engine without reduction, the engine under a plan. Medians of the rounds. Ratios are
stock's seconds over ours (above 1: ours is faster); random weights say nothing about quality. On CPU only the ratios
mean something.

    python benchmarks/engine_vs_transformers.py --size so400m-0.5b --batch 1 --frames 4 --json OUT.json
    python benchmarks/engine_vs_transformers.py --size tiny --batch 1 8 32 --frames 8     # seconds, for a quick look
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import write_json
from benchmarks.random_onevision import SIZES, make_random_onevision
from illava import VLM, Request, SamplingParams, VisualInput, load_preprocessor, preset
from illava.families.llava_onevision import LlavaOnevision
from illava.plan import EMPTY_PLAN, ReductionPlan

PROMPT = "describe the video in two sentences"
STAGES = ("tower", "prefill", "decode", "total")


def time_ours(
    vlm: VLM,
    videos: list[VisualInput],
    new_tokens: int,
    plan: ReductionPlan,
    *,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Seconds by stage of one batch submitted at once, seconds of one decode step, and the tokens drawn.

    ``now`` times the whole; the stages are by the engine's own clock.
    """
    sampling = SamplingParams(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    requests = [Request(str(n), (video, PROMPT), sampling) for n, video in enumerate(videos)]
    started = now()
    done = vlm.generate(requests, plan=plan)
    total_s = now() - started
    for generation in done:
        if generation.error is not None:
            raise generation.error
    timing = done[0].timing
    return {
        "tower": timing.vision_s,
        "prefill": timing.prefill_s,
        "decode": timing.decode_s / (new_tokens - 1),
        "total": total_s,
        "tokens": [generation.token_ids for generation in done],
        "decoder_tokens_kept": done[0].usage.num_decoder_tokens_kept,
    }


class Stock:
    """Stock `generate` with a stopwatch at the seams of its stages: hooks on the model and on its language model."""

    def __init__(self, vlm: VLM, model: Any, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._family, self._model, self._now = vlm.family, model, now

    @torch.inference_mode()
    def time(self, videos: list[VisualInput], new_tokens: int) -> dict[str, Any]:
        """As `time_ours`. What comes before the language model belongs to the tower on both sides, pixels included."""
        family, model = self._family, self._model
        prompt = family.render((videos[0], PROMPT), [family.num_vision_tokens(videos[0])])
        ids = torch.tensor([prompt.token_ids] * len(videos), device=model.device)
        with self._stamps() as stamps:
            started = self._now()
            pixels = family.encoder.pixels(videos).to(family.decoder.dtype).unflatten(0, (len(videos), -1))
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values_videos=pixels,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )
            ended = self._now()
        decoder_starts, first_logits = stamps
        return {
            "tower": decoder_starts - started,
            "prefill": first_logits - decoder_starts,
            "decode": (ended - first_logits) / (new_tokens - 1),
            "total": ended - started,
            "tokens": [tuple(row) for row in out[:, ids.shape[1] :].tolist()],
        }

    @contextmanager
    def _stamps(self) -> Iterator[list[float]]:
        """When the language model first began, and when the first forward pass had ended."""
        stamps: list[float] = []

        def stamp(place: int) -> None:
            if len(stamps) == place:
                stamps.append(self._now())

        inner = self._model.model.language_model.register_forward_pre_hook(lambda *_: stamp(0))
        outer = self._model.register_forward_hook(lambda *_: stamp(1))
        try:
            yield stamps
        finally:
            inner.remove()
            outer.remove()


def measure(vlm: VLM, model: Any, videos: list[VisualInput], args: argparse.Namespace) -> dict[str, Any]:
    """One cell: stock, empty plan and plan in turn, round by round, after a warm-up of one short answer each."""
    plan, stock = preset(args.preset, layout=args.layout), Stock(vlm, model)
    stock.time(videos[:1], 2)
    time_ours(vlm, videos[:1], 2, EMPTY_PLAN)
    time_ours(vlm, videos[:1], 2, plan)
    sides: dict[str, list[dict[str, Any]]] = {"stock": [], "empty": [], "plan": []}
    for _ in range(args.rounds):
        sides["stock"].append(stock.time(videos, args.new_tokens))
        sides["empty"].append(time_ours(vlm, videos, args.new_tokens, EMPTY_PLAN))
        sides["plan"].append(time_ours(vlm, videos, args.new_tokens, plan))
    median = {
        name: {stage: statistics.median(r[stage] for r in rounds) for stage in STAGES} for name, rounds in sides.items()
    }
    spread = {
        name: {stage: max(r[stage] for r in rounds) / min(r[stage] for r in rounds) for stage in STAGES}
        for name, rounds in sides.items()
    }
    pairs = {
        "empty_vs_stock": ("stock", "empty"),
        "plan_vs_stock": ("stock", "plan"),
        "plan_vs_empty": ("empty", "plan"),
    }
    ratios = {
        name: {stage: median[slower][stage] / median[faster][stage] for stage in STAGES}
        for name, (slower, faster) in pairs.items()
    }
    flips = sum(a != b for a, b in zip(sides["stock"][0]["tokens"], sides["empty"][0]["tokens"], strict=True))
    return {
        "batch": len(videos),
        "frames": len(videos[0].tiles),
        "answers_of_empty_plan_unlike_stock": flips,
        "decoder_tokens_kept": {side: sides[side][0]["decoder_tokens_kept"] for side in ("empty", "plan")},
        "ratios": ratios,
        "median_s": median,
        "max_over_min": spread,
    }


def main() -> None:
    """Build the model, measure every batch size, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="so400m-0.5b")
    parser.add_argument("--preset", help="illava-video, or illava-small-video for the tiny shape, unless given")
    parser.add_argument("--layout", choices=["geometric", "released"], default="geometric")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 1], help="of a clip, for each batch size in turn")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    args.preset = args.preset or ("illava-small-video" if args.size == "tiny" else "illava-video")
    frames = (args.frames * len(args.batch))[: len(args.batch)]
    with tempfile.TemporaryDirectory() as folder:
        make_random_onevision(folder, args.size)
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=args.dtype).eval()
        preprocessor = load_preprocessor(folder)
        vlm = VLM(LlavaOnevision(model, AutoTokenizer.from_pretrained(folder), preprocessor))
    side, rng, cells = preprocessor.geometry.tile_px, np.random.default_rng(0), []
    for batch, num_frames in zip(args.batch, frames, strict=True):
        clips = rng.integers(0, 256, (batch, num_frames, side, side, 3), dtype=np.uint8)
        cells.append(measure(vlm, model, [preprocessor.video(clip) for clip in clips], args))
        for name, ratio in cells[-1]["ratios"].items():
            said = "  ".join(f"{stage} {ratio[stage]:.2f}x" for stage in STAGES)
            print(f"batch {batch}, {num_frames} frames, {name:15s} {said}", flush=True)
    setting = {key: getattr(args, key) for key in ("size", "preset", "layout", "new_tokens", "rounds", "dtype")}
    if args.json:
        write_json(args.json, {"benchmark": "engine_vs_transformers", "setting": setting, "cells": cells})


if __name__ == "__main__":
    main()

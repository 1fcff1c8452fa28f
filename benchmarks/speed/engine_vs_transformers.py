"""Times the engine against stock `generate`: tower, prefill, decode per step and end to end, by batch size.

Same weights, same clips, same prompt ids, same forced number of new tokens, same threads. Three sides by turns in one
run: stock (SDPA attention), the engine without reduction, the engine under a plan. A round gives a ratio, stock's
seconds over ours (above 1: ours is faster); reported are their median, its 95 % interval and their range, and a verdict
by the interval. Rounds in which a side takes 10 % longer than in its fastest are refused and measured again; where too
few are quiet, nothing is reported. Each stage alone has rounds of its own (`stages_alone`, decode steps over caches
filled beforehand); `--stages whole` answers whole requests instead, stages by their own stopwatches. Random weights say
nothing about quality. On CPU only the ratios mean something, and those of bfloat16 only on a processor that multiplies
it natively.

    python benchmarks/speed/engine_vs_transformers.py --json OUT.json      # 16 minutes on two idle cores
    python benchmarks/speed/engine_vs_transformers.py --stages whole --batch 8 --frames 1 --rounds 5 --json OUT.json
    python benchmarks/speed/engine_vs_transformers.py --size tiny --batch 1 8 32 --frames 8      # a quick look
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.device_clock import DeviceClock
from benchmarks.common.machine import require_native_products, write_json
from benchmarks.common.paired_rounds import PAIRS, DisturbedRoundsError, by_turns, compared, quiet_rounds
from benchmarks.common.random_onevision import SIZES, make_random_onevision
from benchmarks.speed.stages_alone import Cell
from illava import VLM, Request, SamplingParams, VisualInput, load_preprocessor, preset
from illava.families.llava.onevision import LlavaOnevision
from illava.plan import EMPTY_PLAN, ReductionPlan

PROMPT = "describe the video in two sentences"
STAGES = ("tower", "prefill", "decode", "total")
ALONE = ("tower", "prefill", "decode")


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


def measure_whole(vlm: VLM, model: Any, videos: list[VisualInput], args: argparse.Namespace) -> dict[str, Any]:
    """Whole answers of one cell by all sides, after a warm-up of one short answer each."""
    plan, clock = preset(args.preset, layout=args.layout), DeviceClock(vlm.family.decoder.device)
    stock = Stock(vlm, model, now=clock)

    def sides(videos: list[VisualInput], new_tokens: int) -> dict[str, Callable[[], dict[str, Any]]]:
        return {
            "stock": partial(stock.time, videos, new_tokens),
            "empty": partial(time_ours, vlm, videos, new_tokens, EMPTY_PLAN, now=clock),
            "plan": partial(time_ours, vlm, videos, new_tokens, plan, now=clock),
        }

    by_turns(sides(videos[:1], 2), 1)
    seen = quiet_rounds(
        sides(videos, args.new_tokens), args.rounds, seconds=lambda one: one["total"], most_tries=2 * args.rounds
    )
    seconds = {stage: {side: [one[stage] for one in rounds] for side, rounds in seen.items()} for stage in STAGES}
    by_stage = {stage: compared(of_stage) for stage, of_stage in seconds.items()}
    flips = sum(a != b for a, b in zip(seen["stock"][0]["tokens"], seen["empty"][0]["tokens"], strict=True))
    return {
        "batch": len(videos),
        "frames": len(videos[0].tiles),
        "answers_of_empty_plan_unlike_stock": flips,
        "decoder_tokens_kept": {side: seen[side][0]["decoder_tokens_kept"] for side in ("empty", "plan")},
        "ratios": {name: {stage: by_stage[stage][name] for stage in STAGES} for name in PAIRS},
        "median_s": {side: {stage: statistics.median(seconds[stage][side]) for stage in STAGES} for side in seen},
    }


def measure_stages(vlm: VLM, model: Any, videos: list[VisualInput], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Stages alone, each in rounds of its own, after a warm-up: the tower's by one clip, the others' by a call."""
    plan = preset(args.preset, layout=args.layout)
    cell, first = (Cell(vlm, model, clips, PROMPT, plan) for clips in (videos, videos[:1]))
    found = []
    for stage in (stage for stage in ALONE if stage in args.stages):
        by_turns((first if stage == "tower" else cell).calls(stage, steps=2), 1)
        seconds = quiet_rounds(
            cell.calls(stage, steps=args.decode_steps), args.rounds, seconds=float, most_tries=2 * args.rounds
        )
        median_s = {side: statistics.median(of_side) for side, of_side in seconds.items()}
        where = {"stage": stage, "batch": len(videos), "frames": len(videos[0].tiles)}
        found.append({**where, "median_s": median_s, "ratios": compared(seconds)})
        print("\n".join(said(found[-1])), flush=True)
    return found


def main() -> None:
    """Build the model, measure every cell, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="so400m-0.5b")
    parser.add_argument("--preset", help="illava-video, or illava-small-video for the tiny shape, unless given")
    parser.add_argument("--layout", choices=["geometric", "released"], default="geometric")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 1], help="of a clip, for each batch size in turn")
    parser.add_argument("--stages", nargs="+", choices=[*ALONE, "whole"], default=list(ALONE), help="whole: answers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--decode-steps", type=int, default=16, help="of a round of decode steps alone")
    parser.add_argument("--new-tokens", type=int, default=32, help="of whole answers")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    require_native_products(args.dtype, args.device)
    args.preset = args.preset or ("illava-small-video" if args.size == "tiny" else "illava-video")
    vlm, model = random_model(args)
    keys = ("size", "preset", "layout", "new_tokens", "rounds", "dtype", "device", "decode_steps")
    result: dict[str, Any] = {"setting": {key: getattr(args, key) for key in keys}, "cells": [], "stage_cells": []}
    for sizes in paired(args.batch, args.frames):
        clips = clips_of(vlm, *sizes)
        try:
            result["stage_cells"] += measure_stages(vlm, model, clips, args)
            if "whole" in args.stages:
                result["cells"].append(measure_whole(vlm, model, clips, args))
                print("\n".join(said(result["cells"][-1])), flush=True)
        except DisturbedRoundsError as error:
            raise SystemExit(f"batch {sizes[0]}, {sizes[1]} frames: {error}") from error
        if args.json:
            write_json(args.json, {"benchmark": "engine_vs_transformers", **result})


def said(cell: dict[str, Any]) -> Iterator[str]:
    """A cell in lines."""
    for pair, found in cell["ratios"].items():
        for stage, one in ({f"{cell['stage']} alone": found} if "stage" in cell else found).items():
            ratio = f"{one['median']:.2f}x [{one['low']:.2f}, {one['high']:.2f}]"
            where = f"batch {cell['batch']}, {cell['frames']} frames, {pair:15s} {stage:14s}"
            yield f"{where} {ratio} ({one['min']:.2f} to {one['max']:.2f}) {one['verdict']}"


def paired(batches: list[int], frames: list[int]) -> list[tuple[int, int]]:
    """Each batch size with its number of frames; the last number serves all further ones."""
    return list(zip(batches, frames + frames[-1:] * len(batches), strict=False))


def random_model(args: argparse.Namespace) -> tuple[VLM, Any]:
    """The engine and stock's model, on the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        make_random_onevision(folder, args.size)
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=args.dtype).eval()
        model.requires_grad_(False).to(args.device)
        family = LlavaOnevision(model, AutoTokenizer.from_pretrained(folder), load_preprocessor(folder))
    return VLM(family), model


def clips_of(vlm: VLM, batch: int, frames: int) -> list[VisualInput]:
    """Random clips at model size."""
    preprocessor = vlm.family.preprocessor
    side = preprocessor.geometry.tile_px
    clips = np.random.default_rng(0).integers(0, 256, (batch, frames, side, side, 3), dtype=np.uint8)
    return [preprocessor.video(clip) for clip in clips]


if __name__ == "__main__":
    main()

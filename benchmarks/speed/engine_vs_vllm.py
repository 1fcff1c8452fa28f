"""Times the engine against vLLM and stock transformers: clips/s end to end, by batch size, merging on and off.

vLLM's CPU build lives in an environment of its own, which `benchmarks/speed/setup_vllm.sh FOLDER` makes:

    python benchmarks/speed/engine_vs_vllm.py --vllm FOLDER/bin/python --json
    benchmarks/results/engine_vs_vllm_cpu_bf16.json

Same random weights, same clips (uint8 at model size), same prompt ids, same forced number of new tokens. Four sides
by turns in one run: vLLM, stock `generate`, the engine without reduction, the engine under a plan. Seconds are of the
whole batch: tower, prefill, decoding; vLLM's also hold its own preprocessing, which the other sides have done before.
Rounds in which a side takes 10 % longer than in its fastest are refused. In bfloat16 a processor without native
bfloat16 products is refused, since vLLM's users would not run it there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.machine import require_native_products, write_json
from benchmarks.common.paired_rounds import DisturbedRoundsError, quiet_rounds
from benchmarks.common.random_onevision import SIZES, make_random_onevision
from benchmarks.speed.engine_vs_transformers import PROMPT, Stock, time_ours
from illava import VLM, VisualInput, load_preprocessor, preset
from illava.families.llava.onevision import LlavaOnevision
from illava.plan import EMPTY_PLAN

MARK = "vllm_side:"  # as benchmarks/speed/vllm_side.py writes it


class VLLMSide:
    """vLLM in a process of its own, asked by lines of JSON."""

    def __init__(self, python: str, model: str, dtype: str) -> None:
        command = [python, str(Path(__file__).with_name("vllm_side.py")), model, dtype]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def time(self, **request: Any) -> dict[str, Any]:
        """Seconds of one batch and the tokens counted."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:  # vLLM writes lines of its own
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"vLLM's process ended with {self._process.wait()}; its last words stand above")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def use_published_names(folder: str) -> None:
    """Name the tower's weights as published checkpoints do, which vLLM asks for."""
    file = Path(folder, "model.safetensors")
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(file)
    named = {k if k.startswith(new) else k.replace(old, new, 1): weight for k, weight in weights.items()}
    save_file(named, file, metadata={"format": "pt"})


def unexpanded(prompt_ids: tuple[int, ...], video_token_id: int) -> list[int]:
    """The prompt with one video token in the place of the many: vLLM expands it itself."""
    runs = ((token, list(same)) for token, same in groupby(prompt_ids))
    return [token for of, same in runs for token in ([of] if of == video_token_id else same)]


def measure(vllm: VLLMSide, vlm: VLM, stock: Stock, *, batch: int, frames: int, args: Any) -> dict[str, Any]:
    """One cell: all sides in turn, round by round, after a short answer each."""
    side, plan = vlm.family.preprocessor.geometry.tile_px, preset(args.preset)
    clips = np.random.default_rng(0).integers(0, 256, (batch, frames, side, side, 3), dtype=np.uint8)
    videos = [vlm.family.preprocessor.video(clip) for clip in clips]
    prompt = vlm.family.render((videos[0], PROMPT), [vlm.family.num_vision_tokens(videos[0])])
    ids = unexpanded(prompt.token_ids, args.video_token_id)
    request = {"frames": frames, "side": side, "prompt_ids": ids, "seed": 0}

    def sides(num: int, new_tokens: int, shown: list[VisualInput]) -> dict[str, Callable[[], dict[str, Any]]]:
        return {
            "vllm": partial(vllm.time, batch=num, new_tokens=new_tokens, **request),
            "stock": partial(stock.time, shown, new_tokens),
            "empty": partial(time_ours, vlm, shown, new_tokens, EMPTY_PLAN),
            "plan": partial(time_ours, vlm, shown, new_tokens, plan),
        }

    counted = {name: side() for name, side in sides(1, 2, videos[:1]).items()}["vllm"]
    if counted["prompt_tokens"] != len(prompt.token_ids):
        raise SystemExit(f"vLLM counts {counted['prompt_tokens']} prompt tokens, we {len(prompt.token_ids)}")
    seen = quiet_rounds(
        sides(batch, args.new_tokens, videos),
        args.rounds,
        seconds=lambda one: one["total"],
        most_tries=max(args.rounds, args.tries),
    )
    totals = {name: [one["total"] for one in of_side] for name, of_side in seen.items()}
    median = {name: statistics.median(of_side) for name, of_side in totals.items()}
    return {
        "batch": batch,
        "frames": frames,
        "prompt_tokens": len(prompt.token_ids),
        "median_s": median,
        "ratios": {
            "empty_vs_vllm": median["vllm"] / median["empty"],
            "plan_vs_vllm": median["vllm"] / median["plan"],
            "empty_vs_stock": median["stock"] / median["empty"],
            "plan_vs_stock": median["stock"] / median["plan"],
        },
        "max_over_min": {name: max(of_side) / min(of_side) for name, of_side in totals.items()},
        "rounds_s": totals,
        "stages_s": {
            name: {
                stage: statistics.median(one[stage] for one in seen[name]) for stage in ("tower", "prefill", "decode")
            }
            for name in ("stock", "empty", "plan")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="of the environment that has vllm")
    parser.add_argument("--size", choices=sorted(SIZES), default="so400m-0.5b")
    parser.add_argument("--preset", help="illava-video, or illava-small-video for the tiny shape, unless given")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 1], help="of a clip, for each batch size in turn")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tries", type=int, default=6, help="rounds measured at most, refused ones included")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    require_native_products(args.dtype)
    args.preset = args.preset or ("illava-small-video" if args.size == "tiny" else "illava-video")
    frames, cells = (args.frames * len(args.batch))[: len(args.batch)], []
    with tempfile.TemporaryDirectory() as folder:
        make_random_onevision(folder, args.size)
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=args.dtype).eval()
        vlm = VLM(LlavaOnevision(model, AutoTokenizer.from_pretrained(folder), load_preprocessor(folder)))
        args.video_token_id, stock = model.config.video_token_id, Stock(vlm, model)
        use_published_names(folder)
        with VLLMSide(args.vllm, folder, args.dtype) as vllm:
            for batch, num_frames in zip(args.batch, frames, strict=True):
                try:
                    cells.append(measure(vllm, vlm, stock, batch=batch, frames=num_frames, args=args))
                except DisturbedRoundsError as error:
                    raise SystemExit(f"batch {batch}, {num_frames} frames: {error}") from error
                print(f"batch {batch}, {num_frames} frames: {cells[-1]['ratios']}", flush=True)
    setting = {key: getattr(args, key) for key in ("size", "preset", "new_tokens", "rounds", "dtype")}
    if args.json:
        write_json(args.json, {"benchmark": "engine_vs_vllm", "setting": setting, "cells": cells})


if __name__ == "__main__":
    main()

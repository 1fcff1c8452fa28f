"""Measures in some seconds how much faster a few layers of a published model's true shape are with merging.

The first blocks of the tower and the first layers of the language model, at their true width, with random weights:
speed only, nothing about quality. Both sides take turns on one thread, and CPU seconds of one turn are divided, which a
machine's other work hardly moves. `make demo` runs it, since its own model is too small to gain time.

    python benchmarks/speed/few_layers.py --seconds 15
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.random_onevision import SIZES

if TYPE_CHECKING:
    from illava import VLM, Request
    from illava.plan import ReductionPlan

SIZE, PRESET = "so400m-0.5b", "illava-video"  # LLaVA-OneVision 0.5B, and its preset
NUM_BLOCKS, NUM_LAYERS = 8, 4  # the preset merges in blocks 3 to 6, and before layer 2
MIN_TURNS = 1


@dataclass(frozen=True, slots=True)
class FewLayers:
    """Holds how many times as fast the merged side was.

    Attributes:
        ratio: tower and prefill together, median over the turns.
        low, high: the least and the greatest of them.
        num_turns: measured.
        num_frames: of the clip.
    """

    ratio: float
    low: float
    high: float
    num_turns: int
    num_frames: int

    def __str__(self) -> str:
        shape = SIZES[SIZE]
        blocks, layers = shape["vision"]["num_hidden_layers"], shape["text"]["num_hidden_layers"]
        turns = f"{self.num_turns} turns" if self.num_turns > 1 else "one turn"
        return (
            f"{NUM_BLOCKS} of the {blocks} tower blocks and {NUM_LAYERS} of the {layers} language-model layers of "
            f"LLaVA-OneVision 0.5B, true shapes and random weights, preset {PRESET}: {self.ratio:.2f}x as fast "
            f"({turns}, {self.low:.2f} to {self.high:.2f}, CPU seconds)"
        )


def measure_few_layers(seconds: float, *, num_frames: int = 1) -> FewLayers:
    """Measure for about so many seconds, two turns at least; building the layers and one warm-up come on top."""
    import torch

    from illava import VLM, Request, SamplingParams, load_preprocessor, preset
    from illava.plan import EMPTY_PLAN

    with tempfile.TemporaryDirectory() as folder:
        vlm = VLM(_family(folder))
        video = load_preprocessor(folder)
        side = video.geometry.tile_px
        frames = np.random.default_rng(0).integers(0, 256, (num_frames, side, side, 3), dtype=np.uint8)
        sampling = SamplingParams(max_new_tokens=1, min_new_tokens=1)
        request = Request("few", (video.video(frames), "describe the clip"), sampling)
    plans, num_threads = (EMPTY_PLAN, preset(PRESET)), torch.get_num_threads()
    ratios: list[float] = []
    until_s = time.perf_counter() + seconds
    torch.set_num_threads(1)  # threads that wait for each other would count as working
    try:
        _cpu_s(vlm, request, plans[1])  # warms up
        while len(ratios) < MIN_TURNS or time.perf_counter() < until_s:
            whole_s, merged_s = (_cpu_s(vlm, request, plan) for plan in plans)
            ratios.append(whole_s / merged_s)
    finally:
        torch.set_num_threads(num_threads)
    return FewLayers(statistics.median(ratios), min(ratios), max(ratios), len(ratios), num_frames)


def _cpu_s(vlm: VLM, request: Request, plan: ReductionPlan) -> float:
    began_s = time.process_time()
    vlm.generate([request], plan=plan)
    return time.process_time() - began_s


def _family(folder: str):
    """The layers as a family; the folder gets a tokenizer and a preprocessor of the true geometry."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlavaOnevisionForConditionalGeneration

    from illava import load_preprocessor
    from illava.families.llava.onevision import LlavaOnevision
    from tests.support.models.onevision import make_onevision

    shape = SIZES[SIZE]
    make_onevision(folder, side=shape["side"], patch=shape["patch"])
    config = AutoConfig.from_pretrained(folder)
    for section, depth, changes in (
        (config.vision_config, NUM_BLOCKS, shape["vision"]),
        (config.text_config, NUM_LAYERS, shape["text"]),
    ):
        for name, value in (changes | {"num_hidden_layers": depth}).items():
            setattr(section, name, value)
    config.text_config.layer_types = ["full_attention"] * NUM_LAYERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaOnevisionForConditionalGeneration(config).eval()
    return LlavaOnevision(model, AutoTokenizer.from_pretrained(folder), load_preprocessor(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--frames", type=int, default=1)
    args = parser.parse_args()
    print(measure_few_layers(args.seconds, num_frames=args.frames))

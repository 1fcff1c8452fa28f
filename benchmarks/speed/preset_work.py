"""Counts what presets compute at LLaVA-OneVision-7B's true shapes: FLOPs of tower and prefill against no merging.

On meta tensors (`flops.py`): nothing is computed, so the counts are the same on every machine. The scores that a method
asks for count; choosing and merging do not (`reducer_overhead.py` measures those).

    python benchmarks/speed/preset_work.py --json benchmarks/results/preset_work_7b.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.device_onevision import build_onevision
from benchmarks.common.machine import write_json
from benchmarks.speed.flops import prefill_flops, tower_flops
from illava.families.llava.onevision import LlavaOnevision
from illava.plan import EMPTY_PLAN, ReductionPlan, preset
from illava.token_counts import VisualShape, expected_counts

FRAMES, SIDE_PX, TEXT_TOKENS = 32, 1024, 24
MEDIA = {"video": VisualShape("video", 720, 1280, FRAMES), "image": VisualShape("image", SIDE_PX, SIDE_PX)}
PRESETS = {
    "video": ("illava-video", "ward-video-50", "ward-video-25"),
    "image": ("illava-image", "ward-image-50", "ward-image-25"),
}


def work(family: LlavaOnevision, visual: VisualShape, plan: ReductionPlan) -> dict[str, Any]:
    """FLOPs and token counts of one request."""
    counts = expected_counts(
        family.geometry,
        plan,
        [visual],
        num_vision_blocks=family.num_vision_blocks,
        num_decoder_layers=family.decoder.num_layers,
    )
    patches = family.geometry.grid**2
    blocks, scored = [patches], []
    for n in range(family.tower.num_blocks):
        reducer = plan.at("vision_block", n)
        if reducer is not None and reducer.evidence("vision_block") - {"sizes"}:
            scored.append(n)
        kept = None if reducer is None else reducer.num_kept(blocks[-1])
        blocks.append(blocks[-1] if kept is None else kept)
    left, lengths = counts.num_vision_tokens_kept, []
    for layer in range(family.decoder.num_layers):
        reducer = plan.at("decoder_layer", layer)
        kept = None if reducer is None else reducer.num_kept(left)
        left = left if kept is None else kept
        lengths.append([left + TEXT_TOKENS])
    return {
        "tower": tower_flops(family, counts.num_patches // patches, blocks, scored=scored),
        "prefill": prefill_flops(family.decoder, lengths),
        "patches": [patches, blocks[-1]],
        "tokens": [counts.num_vision_tokens, counts.num_vision_tokens_kept, left],
    }


def measure(shape: str) -> dict[str, Any]:
    """Of each preset: counts, and how many times less it computes than no merging."""
    _, family, _ = build_onevision(shape, device=torch.device("meta"), dtype=torch.bfloat16)
    found: dict[str, Any] = {}
    for kind, names in PRESETS.items():
        whole = work(family, MEDIA[kind], EMPTY_PLAN)
        for name in names:
            own = work(family, MEDIA[kind], preset(name))
            less = {stage: round(whole[stage] / own[stage], 3) for stage in ("tower", "prefill")}
            both = sum(whole[stage] for stage in less) / sum(own[stage] for stage in less)
            found[name] = {"medium": kind, **own, "times_less": {**less, "both": round(both, 3)}}
    return found


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["7b"], default="7b")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args.shape)
    for name, own in found.items():
        print(f"{name:16s} {own['times_less']} patches {own['patches']} tokens {own['tokens']}")
    if args.json:
        setting = {"shape": args.shape, "frames": FRAMES, "image_px": SIDE_PX, "text_tokens": TEXT_TOKENS}
        write_json(args.json, {"benchmark": "preset_work", "setting": setting, "presets": found})


if __name__ == "__main__":
    main()

"""The media and plans that the vision tests of the Qwen families share."""

from __future__ import annotations

import numpy as np

from illava.plan import ReductionPlan

BLOCKS = {"qwen2_vl": (2, 3), "qwen2_5_vl": (1, 3), "qwen3_vl": (1, 3), "qwen3_vl_moe": (1, 3), "qwen3_5": (1, 3)}


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def video(pre, count, height, width):
    return pre.video(
        [picture(height, width, seed) for seed in range(count)], timestamps_s=[0.7 * n for n in range(count)]
    )


def plan(vlm, *, decoder: bool = False, **budget) -> ReductionPlan:
    reducer = {"kind": "illava", **(budget or {"keep_ratio": 0.7})}
    steps = [{"stage": "vision_block", "layers": BLOCKS[vlm.family.model_type], "reducer": reducer}]
    if decoder:
        layers = [n + 1 for n in vlm.family.decoder.kv_layers if n < 2]  # behind layers that attend
        steps.append({"stage": "decoder_layer", "layers": layers, "reducer": {"kind": "illava", "keep_ratio": 0.8}})
    return ReductionPlan(steps=steps)


def encode(vlm, media, which, *, trace=False):
    return vlm.family.encode(media, which, trace=trace)

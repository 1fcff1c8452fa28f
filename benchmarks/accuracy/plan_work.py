"""Counts what each plan of the comparison computes on the toy: FLOPs of tower and prefill against no reduction.

Real requests under torch's counter: attention scores that a method asks for and products of its own choosing count,
sorting and additions do not, as `torch.utils.flop_counter` has it. Counts are the same on every machine. Every toy has
the same shape, so this stands for all of them; where the data decide how many tokens stay, for these samples.

    python benchmarks/accuracy/plan_work.py --json benchmarks/results/plan_work.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy.compared_plans import compared_plans
from benchmarks.common.machine import write_json
from benchmarks.toy_model.data.testset import load_sample
from illava import VLM, Preprocessor, Request, SamplingParams, load_preprocessor
from illava.plan import EMPTY_PLAN, ReductionPlan

MODEL = Path(__file__).resolve().parents[2] / "configs" / "demo" / "model"
FIRST_SEED = 40_000
KINDS = {"pictures": ("scene", "chart", "table"), "clips": ("motion", "order")}


def plan_work(model: str) -> dict[str, dict[str, float]]:
    """Work over that of no reduction: of pictures and of clips, by plan."""
    vlm = VLM.from_pretrained(model, dtype="float32", device="cpu", kv_cache_bytes=64 << 20)
    preprocessor = load_preprocessor(model)
    requests = {side: [_request(preprocessor, kind, FIRST_SEED) for kind in kinds] for side, kinds in KINDS.items()}
    whole = {side: _flops(vlm, own, EMPTY_PLAN) for side, own in requests.items()}
    return {
        name: {
            side: round(_flops(vlm, requests[side], plan) / whole[side], 4) if plan.steps else 1.0
            for side, plan in zip(KINDS, pair, strict=True)
        }
        for name, pair in compared_plans().items()
    }


def _request(preprocessor: Preprocessor, kind: str, seed: int) -> Request:
    """A sample's first question; one token is drawn, from the prefill."""
    one = load_sample((kind, seed))
    frames = one.sample.frames
    media = [preprocessor.video(frames)] if one.is_clip else preprocessor.images(frames)
    return Request(one.sample_id, (*media, one.questions[0].text), SamplingParams(max_new_tokens=1))


def _flops(vlm: VLM, requests: Iterable[Request], plan: ReductionPlan) -> int:
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        for request in requests:  # one by one: what is packed together shares no product
            vlm.generate([request], plan=plan)
    return counter.get_total_flops()


def _of_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = plan_work(args.model)
    for name, ratios in work.items():
        print(f"{ratios['pictures']:7.1%} {ratios['clips']:7.1%}  {name}")
    if args.json:
        write_json(args.json, {"benchmark": "plan_work", "kinds": KINDS, "first_seed": FIRST_SEED, "plans": work})


if __name__ == "__main__":
    main()

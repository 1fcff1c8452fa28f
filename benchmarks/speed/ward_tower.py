"""Times a tower under `ward` against the same tower under `illava`, at equal tokens: so400m shapes, CPU seconds.

`illava` stands where `ward`'s preset cuts, and where its own presets do: in four blocks, of which the last is the same
(`illava-image`) or two earlier (`illava-video`), each with as many tokens left in the end. Blocks that are cut earlier
cost less whatever the method, so each side's counted operations stand beside its seconds. One block with random weights
is run 26 times. Sides take turns, in reverse order every other round; a ratio is of one round's seconds.

    python benchmarks/speed/ward_tower.py --rounds 7 --json benchmarks/results/ward_tower_cpu.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.machine import write_json
from benchmarks.common.paired_rounds import by_turns, spread
from benchmarks.speed.reducer_overhead import DIM, GRID, HEADS, MLP_DIM, NUM_BLOCKS
from illava import preset
from illava.families.llava.towers import run_blocks
from illava.plan import ReductionPlan
from illava.reduction.vision import VisionReduction

BASE = "illava in ward's blocks"
_ILLAVA_BLOCKS = {"illava, as illava-image": (5, 6, 7, 8), "illava, as illava-video": (3, 4, 5, 6)}


def sides(percent: int) -> dict[str, ReductionPlan]:
    """The tower's steps of ward's preset, and `illava` down to as many tokens in as many or four cuts."""
    of_preset = preset(f"ward-image-{percent}")
    (step,) = of_preset.steps
    cuts = {BASE: step.layers, **_ILLAVA_BLOCKS}
    plans = {name: _illava(blocks, percent / 100) for name, blocks in cuts.items()}
    return {"ward": of_preset, "ward, weighted by attention": _by_attention(of_preset), **plans}


def _illava(blocks: tuple[int, ...], keep: float) -> ReductionPlan:
    reducer = {"kind": "illava", "keep_ratio": keep ** (1 / len(blocks))}
    return ReductionPlan.model_validate({"steps": [{"stage": "vision_block", "layers": blocks, "reducer": reducer}]})


def _by_attention(plan: ReductionPlan) -> ReductionPlan:
    """The same cuts weighted by attention received in place of contrast, as the presets were before."""
    (step,) = plan.steps
    reducer = step.reducer.model_dump() | {"contrast": 0.0, "alpha": 0.5}
    return ReductionPlan.model_validate({"steps": [step.model_dump() | {"reducer": reducer}]})


class Tower:
    """One block of so400m's shape, run as often as the tower has blocks."""

    def __init__(self, num_frames: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = SiglipVisionConfig(hidden_size=DIM, intermediate_size=MLP_DIM, num_attention_heads=HEADS)
        config._attn_implementation = "sdpa"
        self._block = SiglipEncoderLayer(config).eval().to(dtype)
        self._lengths = (GRID * GRID,) * num_frames
        self._coord_T3 = torch.cartesian_prod(torch.arange(num_frames), torch.arange(GRID), torch.arange(GRID))
        self._hidden_TD = torch.randn(len(self._coord_T3), DIM).to(dtype)

    def run(self, plan: ReductionPlan) -> VisionReduction:
        """Run all blocks under a plan; what was done is told."""
        reduction = VisionReduction(plan, self._lengths, self._coord_T3, num_blocks=NUM_BLOCKS)
        run_blocks([self._block] * NUM_BLOCKS, self._hidden_TD, reduction)
        return reduction


def counted_gflops(plan: ReductionPlan, reduction: VisionReduction) -> float:
    """Multiplications and additions of the blocks' products, of scores where the plan's steps ask for them."""
    after = {step.block: step.assignment.lengths for step in reduction.steps}
    lengths, total = reduction.steps[0].assignment.num_tokens, 0.0
    num_segments = len(reduction.steps[0].assignment.lengths)
    width = lengths / num_segments
    for block in range(NUM_BLOCKS):
        reducer = plan.at("vision_block", block)
        scored = reducer is not None and "attention_received" in reducer.evidence("vision_block")
        total += num_segments * (8 * width * DIM**2 + (4 + 2 * scored) * width**2 * DIM)
        if block in after:
            width = sum(after[block]) / num_segments
        total += num_segments * 4 * width * DIM * MLP_DIM
    return total / 1e9


@torch.inference_mode()
def measure(percent: int, *, num_frames: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """CPU seconds of each side, and its ratio to `illava` in the same blocks."""
    tower, plans = Tower(num_frames, dtype), sides(percent)

    def timed(plan: ReductionPlan) -> Callable[[], float]:
        def run() -> float:
            started = time.process_time()
            tower.run(plan)
            return time.process_time() - started

        return run

    done = {name: tower.run(plan) for name, plan in plans.items()}
    taken = by_turns({name: timed(plan) for name, plan in plans.items()}, rounds)
    found = {}
    for name, plan in plans.items():
        ratios = [own / base for own, base in zip(taken[name], taken[BASE], strict=True)]
        found[name] = {
            "blocks": list(plan.layers("vision_block")),
            "tokens_a_frame": sum(done[name].lengths) / num_frames,
            "gflop": round(counted_gflops(plan, done[name]), 1),
            "fastest_s": min(taken[name]),
            "over_base": {key: value for key, value in spread(ratios).items() if key != "verdict"},
        }
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--percent", type=int, nargs="+", choices=[50, 25], default=[25])
    parser.add_argument("--frames", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for percent in args.percent:
        results[str(percent)] = measure(
            percent, num_frames=args.frames, rounds=args.rounds, dtype=getattr(torch, args.dtype)
        )
        for name, row in results[str(percent)].items():
            ratio = row["over_base"]
            interval = f"{ratio['median']:.3f}x [{ratio['low']:.3f}, {ratio['high']:.3f}]"
            print(f"{percent} % {name:26} {interval} {row['gflop']:9.1f} GFLOP, {row['tokens_a_frame']:.0f} tokens")
    if args.json:
        setting = {"frames": args.frames, "rounds": args.rounds, "threads": args.threads, "dtype": args.dtype}
        write_json(args.json, {"benchmark": "ward_tower", "setting": setting, "base": BASE, "percent": results})


if __name__ == "__main__":
    main()

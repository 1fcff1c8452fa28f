"""Times each method's choice of tokens, its evidence and its application, as shares of the tower's time.

Random tokens, keys and scores: what a method picks means nothing here, only what picking costs. The tower's time is
that of one unreduced block of so400m shape (random weights) times its 26. One step is counted; a plan of four pays
four times. Methods of stage ``media`` act on pixels in the readers and are not in it. All methods take turns in every
round; medians of the rounds. On CPU the seconds are CPU seconds of all threads, which a busy machine disturbs less than
wall time, and only the ratios mean something. ``kernels`` counts the operations of one choice that compute something,
views and empty tensors left out: about as many kernels as a GPU would run, but for `ward`, whose rounds are one there.

    python benchmarks/speed/reducer_overhead.py --segments 8 --rounds 5 --json
    benchmarks/results/reducer_overhead_cpu.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.machine import write_json
from illava.attention.scores import attention_received
from illava.families.llava.towers import run_blocks
from illava.plan import EMPTY_PLAN
from illava.reducers import REDUCERS, AnyReducer, Evidence, Reducer
from illava.reduction.vision import VisionReduction
from illava.tokens import Tokens, merge

GRID, DIM, HEADS, MLP_DIM, NUM_BLOCKS = 27, 1152, 16, 4304, 26
REFERENCE = "illava"


class Operations(TorchDispatchMode):
    """Counts the operations that compute something."""

    num_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_ops += not (func.is_view or "empty" in func.__name__ or func.__name__.startswith("_unsafe_view"))
        return func(*args, **(kwargs or {}))


def method_configs(keep_ratio: float) -> dict[str, dict[str, Any]]:
    """Every registered method at one share of kept tokens, as far as it takes one."""
    side = round(GRID * keep_ratio**0.5)
    own = {"pooling": {"grid": [side, side]}, "prumerge": {}, "frame_merging": {}, "bounded_error": {"epsilon": 0.7}}
    kinds = [kind for kind, reducer in REDUCERS.items() if reducer.stages != {"media"}]
    configs = {kind: {"kind": kind, **own.get(kind, {"keep_ratio": keep_ratio})} for kind in kinds}
    configs["prumerge+"] = {"kind": "prumerge", "plus": True}
    return configs


def random_input(num_segments: int, device: str) -> tuple[Tokens, Evidence]:
    """Frames of a SigLIP so400m tower: 729 tokens of width 1152, 16 heads of 72."""
    gen = torch.Generator().manual_seed(0)
    per_segment = GRID * GRID
    total = num_segments * per_segment
    coord_T3 = torch.cartesian_prod(torch.arange(num_segments), torch.arange(GRID), torch.arange(GRID))
    scores = {
        name: torch.rand(total, generator=gen).to(device)
        for name in (
            "attention_received_T",
            "causal_normalised_attention_T",
            "last_query_attention_T",
            "own_layer_query_attention_T",
            "cls_attention_T",
        )
    }
    evidence = Evidence(
        **scores,
        keys_THd=torch.randn(total, HEADS, DIM // HEADS, generator=gen).to(device),
        size_T=torch.ones(total, device=device),
        seeds=tuple(range(num_segments)),
    )
    hidden_TD = torch.randn(total, DIM, generator=gen).to(device)
    return Tokens(hidden_TD, (per_segment,) * num_segments, coord_T3.to(device)), evidence


def as_one_medium(tokens: Tokens) -> Tokens:
    """The same tokens as one segment: what methods that compare frames see."""
    return Tokens(tokens.hidden_TD, (sum(tokens.lengths),), tokens.coord_T3)


def seconds(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """One call's CPU seconds, or on CUDA its wall time with the device's work included."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started, result


def tower_parts(frames: Tokens, device: str) -> dict[str, Callable[[], Any]]:
    """One unreduced block, and the exact attention received in it, as calls to be timed."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(hidden_size=DIM, intermediate_size=MLP_DIM, num_attention_heads=HEADS)
    config._attn_implementation = "sdpa"
    block = SiglipEncoderLayer(config).eval().to(device)
    qk_THd = frames.hidden_TD.unflatten(1, (HEADS, -1))
    scale = (DIM // HEADS) ** -0.5

    def run() -> torch.Tensor:
        reduction = VisionReduction(EMPTY_PLAN, frames.lengths, frames.coord_T3, num_blocks=1)
        return run_blocks([block], frames.hidden_TD, reduction)

    return {"block": run, "score": lambda: attention_received(qk_THd, qk_THd, frames.lengths, scale=scale)}


@torch.inference_mode()
def measure(keep_ratio: float, num_segments: int, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Median seconds of `assign` and `merge` per method, their ratio to the reference, and the tokens left."""
    frames, evidence = random_input(num_segments, device)
    adapter: TypeAdapter[Reducer] = TypeAdapter(AnyReducer)
    reducers = {name: adapter.validate_python(config) for name, config in method_configs(keep_ratio).items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in reducers}
    counts: dict[str, int] = {}
    num_ops: dict[str, int] = {}
    parts = tower_parts(frames, device)
    part_times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(rounds + 1):
        for name, part in parts.items():
            part_s, _ = seconds(part, device)
            if turn:
                part_times[name].append(part_s)
        for name, reducer in reducers.items():
            across = reducer.merges_frames or reducer.stages == {"decoder_input"}
            tokens = as_one_medium(frames) if across else frames
            stage = sorted(reducer.stages)[0]
            assign_s, assignment = seconds(lambda: reducer.assign(tokens, evidence, stage), device)  # noqa: B023
            merge_s, _ = seconds(lambda: merge(assignment, tokens.hidden_TD), device)  # noqa: B023
            counts[name] = assignment.num_kept
            if not turn:
                with Operations() as operations:
                    reducer.assign(tokens, evidence, stage)
                num_ops[name] = operations.num_ops
            if turn:  # the first turn warms up
                times[name].append((assign_s, merge_s))
    middle = {
        name: tuple(statistics.median(t) for t in zip(*measured, strict=True)) for name, measured in times.items()
    }
    tower_s, score_s = (
        statistics.median(part_times[name]) * count for name, count in (("block", NUM_BLOCKS), ("score", 1))
    )
    evidence_s = {
        name: score_s if "attention_received" in reducer.evidence(sorted(reducer.stages)[-1]) else 0.0
        for name, reducer in reducers.items()
    }
    return {
        name: {
            "tower_share": round((assign_s + merge_s) / tower_s, 5),
            "score_share": round(evidence_s[name] / tower_s, 5),
            "select_s": round(assign_s, 6),
            "select_ratio": round(assign_s / middle[REFERENCE][0], 2),
            "merge_s": round(merge_s, 6),
            "tokens_kept": counts[name],
            "kernels": num_ops[name],
        }
        for name, (assign_s, merge_s) in middle.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--segments", type=int, default=8, help="frames of 729 tokens")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, default=None, help="where the result goes")
    args = parser.parse_args()
    methods = measure(args.keep_ratio, args.segments, args.rounds, args.device)
    settings = {"segments": args.segments, "tokens_per_segment": GRID * GRID, "dim": DIM, "keep_ratio": args.keep_ratio}
    for name, row in sorted(methods.items(), key=lambda item: item[1]["select_s"]):
        cost = (
            f"{1e3 * row['select_s']:9.2f} ms  x{row['select_ratio']:<8} {100 * row['tower_share']:6.2f} % of the tower"
        )
        print(f"{name:20} {cost}, kept {row['tokens_kept']}, {row['kernels']} kernels")
    if args.json is not None:
        result = {"benchmark": "reducer_overhead", "device": args.device, "rounds": args.rounds}
        write_json(args.json, {**result, **settings, "reference": REFERENCE, "methods": methods})
        print(f"written to {args.json}")


if __name__ == "__main__":
    main()

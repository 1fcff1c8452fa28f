"""Times prefill and decode steps of language-model layers with a log-size bias against the same without.

Random weights at the layer shapes of Qwen2-0.5B and Qwen2-7B; prompts of so many visual tokens with random sizes, and
decode steps over them. Both sides take turns, in reverse order every other round, and the ratios of a round's seconds
are reported with their scatter. Seconds on CPU are CPU seconds of one thread, which a busy machine disturbs least.

    python benchmarks/speed/size_bias.py --rounds 15 --json benchmarks/results/size_bias_cpu.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.machine import write_json
from benchmarks.common.paired_rounds import by_turns, spread
from illava.decoder.decoder import Decoder
from illava.decoder.kv_cache import PagedCache
from illava.decoder.prefill import PrefillRun
from illava.engine.prompt import Prompt, pack
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.visual_tokens import TokenSpan

BIASED = ReductionPlan.model_construct(layout="geometric", steps=(), size_bias=True)
NUM_LAYERS, NUM_TEXT, BLOCK_SIZE, NUM_STEPS = 3, 24, 16, 10
SHAPES: dict[str, dict[str, int]] = {
    "qwen2_0.5b": dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2),
    "qwen2_7b": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4),
}


class Bench:
    """Layers of one shape with prompts over them, prefilled once with biases and once without."""

    def __init__(self, shape: str, *, num_visual: int, batch: int, device: str) -> None:
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=512, num_hidden_layers=NUM_LAYERS, **SHAPES[shape])
        model = Qwen2ForCausalLM(config).eval().to(device)
        self.decoder, self.batch, width = Decoder(model.model, model.lm_head), batch, config.hidden_size
        length = num_visual + NUM_TEXT
        coord_T4 = torch.full((length, 4), -1)
        coord_T4[:num_visual] = 0
        spans = (TokenSpan(num_visual, 0, 0, -1), TokenSpan(NUM_TEXT))
        size_T = torch.cat([torch.randint(1, 9, (num_visual,)).float(), torch.ones(NUM_TEXT)]).to(device)
        plain = Prompt(
            torch.randn(length, width, device=device), torch.arange(length, device=device)[None], coord_T4.to(device),
            None, spans, torch.tensor([length], device=device),
        )  # fmt: skip
        self.prompts = {"plain": [plain] * batch, "biased": [replace(plain, size_T=size_T)] * batch}
        self.caches = {side: self._filled(side) for side in self.prompts}
        self.new_BD = torch.randn(batch, width, device=device)
        self.length = length

    def _filled(self, side: str) -> PagedCache:
        decoder, length = self.decoder, self.prompts[side][0].num_tokens
        blocks = self.batch * NUM_LAYERS * (length // BLOCK_SIZE + 9)
        cache = PagedCache(
            num_layers=NUM_LAYERS, num_kv_heads=decoder.num_kv_heads, head_dim=decoder.head_dim, num_blocks=blocks,
            block_size=BLOCK_SIZE, dtype=decoder.dtype, device=decoder.device,
        )  # fmt: skip
        for row in range(self.batch):
            cache.admit(row, [length + 100] * NUM_LAYERS)
        return cache

    def prefill(self, side: str) -> Any:
        """Prefill all prompts into their blocks, which they hold already."""
        cache, rows = self.caches[side], range(self.batch)
        blocks = cache.batch(rows, [[0] * NUM_LAYERS] * self.batch)
        plan = BIASED if side == "biased" else EMPTY_PLAN
        run = PrefillRun(self.decoder, pack(self.prompts[side]), plan, cache, blocks, seeds=[0] * self.batch)
        return run.advance()

    def decode(self, side: str) -> Any:
        """Run decode steps of all rows."""
        lengths = [[self.length] * NUM_LAYERS] * self.batch
        blocks = self.caches[side].batch(range(self.batch), lengths, lengths if side == "biased" else ())
        position_PB = torch.full((1, self.batch), self.length, device=self.new_BD.device)
        for _ in range(NUM_STEPS):
            logits_BV = self.decoder.decode(self.new_BD, position_PB, self.caches[side], blocks)
            position_PB = position_PB + 1
        return logits_BV


def seconds(call: Callable[[str], Any], side: str, device: str) -> float:
    """One call's CPU seconds, or on CUDA its wall time with the device's work included."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    call(side)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


@torch.inference_mode()
def measure(shape: str, *, num_visual: int, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Seconds and ratios (biased over plain) of a prefill and of decode steps."""
    bench, found = Bench(shape, num_visual=num_visual, batch=batch, device=device), {}
    for name, call in (("prefill", bench.prefill), ("decode", bench.decode)):
        sides = {side: lambda side=side, call=call: seconds(call, side, device) for side in ("plain", "biased")}
        by_turns(sides, 1)
        taken = by_turns(sides, rounds)
        ratios = [biased / plain for plain, biased in zip(taken["plain"], taken["biased"], strict=True)]
        found[name] = {
            "plain_s": min(taken["plain"]),
            "biased_s": min(taken["biased"]),
            "ratio_of_fastest": min(taken["biased"]) / min(taken["plain"]),
            "biased_over_plain": {key: value for key, value in spread(ratios).items() if key != "verdict"},
        }
        print(shape, name, found[name], flush=True)
    return {"num_visual": num_visual, "batch": batch, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = {"qwen2_0.5b": (784, 2), "qwen2_7b": (392, 1)}
    results = {
        shape: measure(shape, num_visual=num_visual, batch=batch, rounds=args.rounds, device=args.device)
        for shape, (num_visual, batch) in cases.items()
        if shape in args.shapes
    }
    if args.json:
        told = {"benchmark": "size_bias", "device": args.device, "num_layers": NUM_LAYERS, "rounds": args.rounds}
        write_json(args.json, {**told, "threads": args.threads, "shapes": results})


if __name__ == "__main__":
    main()

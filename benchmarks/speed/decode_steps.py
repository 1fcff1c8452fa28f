"""Times decode steps alone, over caches as long as a prompt's: stock `generate`, the engine without, with a plan.

Keys and values are random and lie in the caches before the clock starts, so that neither tower nor prefill has to run:
a step's time depends on their number alone. The engine decodes by its own `step`, stock by `generate` over a cache that
is filled already. What the plan's cache holds in each layer is counted from geometry. Measures steps; writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common.device_clock import DeviceClock
from illava import VLM, Request, SamplingParams
from illava.engine.request_state import RequestState
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.token_counts import VisualShape, expected_counts


def layer_lengths(vlm: VLM, plan: ReductionPlan, *, frames: int, num_text: int) -> list[int]:
    """Tokens that each decoder layer holds of a prompt with one clip and ``num_text`` tokens of text."""
    family, lengths = vlm.family, []
    side = family.preprocessor.geometry.tile_px
    for layer in range(family.decoder.num_layers):
        steps = tuple(s for s in plan.steps if s.stage != "decoder_layer" or s.layers[0] <= layer)
        counts = expected_counts(
            family.preprocessor.geometry,
            plan.model_copy(update={"steps": steps}),
            [VisualShape("video", side, side, frames)],
            num_vision_blocks=10**6,
            num_decoder_layers=family.decoder.num_layers,
        )
        lengths.append(num_text + counts.num_decoder_tokens_kept)
    return lengths


def time_engine(vlm: VLM, lengths: Sequence[int], *, batch: int, steps: int, plan: ReductionPlan = EMPTY_PLAN) -> float:
    """Seconds of one of the engine's decode steps for ``batch`` requests that hold ``lengths`` tokens by layer."""
    engine, sampling = vlm.engine, SamplingParams(max_new_tokens=steps + 2, min_new_tokens=steps + 2)
    for n in range(batch):
        state = RequestState(Request(str(n), ("decoding",), sampling), plan, (), now=time.perf_counter())
        state.lengths, state.num_visual, state.token_ids = list(lengths), [0] * len(lengths), [n]
        state.next_position_P = torch.tensor([lengths[0]], device=vlm.family.decoder.device)
        engine.cache.admit(state.request_id, [length + steps + 2 for length in lengths])
        engine._running.append(state)
    clock = DeviceClock(vlm.family.decoder.device)
    engine.step()  # composes the batch, as the step that ends a prefill does
    started = clock()
    for _ in range(steps):
        done = engine.step()
    taken_s = clock() - started
    if len(done) != batch or any(generation.error for generation in done):
        raise RuntimeError(f"{len(done)} of {batch} requests ended as asked; {[g.error for g in done if g.error]}")
    return taken_s / steps


@torch.inference_mode()
def time_stock(model: Any, num_tokens: int, *, batch: int, steps: int) -> float:
    """Seconds of one step of stock `generate` for ``batch`` rows of ``num_tokens`` tokens; its first is not counted."""
    config = model.config.text_config
    width = config.hidden_size // config.num_attention_heads
    cache, shape = DynamicCache(config=config), (batch, config.num_key_value_heads, num_tokens, width)
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, *shape, dtype=model.dtype, device=model.device)
        cache.update(keys, values, layer)
    stamps: list[float] = []
    clock = DeviceClock(model.device)
    hook = model.register_forward_hook(lambda *_: stamps.append(clock()))
    try:
        ids = torch.full((batch, num_tokens + 1), 7, device=model.device)
        new = steps + 1
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        ended = clock()
    finally:
        hook.remove()
    if len(stamps) != new or cache.get_seq_length() != num_tokens + new:
        raise RuntimeError(f"{len(stamps)} forward passes left {cache.get_seq_length()} keys of {num_tokens} + {new}")
    return (ended - stamps[0]) / steps


def step_calls(
    vlm: VLM, model: Any, plan: ReductionPlan, *, batch: int, frames: int, num_text: int, steps: int
) -> dict[str, Callable[[], float]]:
    """The three sides as calls, each giving seconds of one step over caches as long as a prompt's."""
    whole = layer_lengths(vlm, EMPTY_PLAN, frames=frames, num_text=num_text)
    kept = layer_lengths(vlm, plan, frames=frames, num_text=num_text)
    vlm.engine.cache.k_pool_PSGd.zero_()  # memory that was never written may hold NaN
    vlm.engine.cache.v_pool_PSGd.zero_()
    return {
        "stock": partial(time_stock, model, whole[0], batch=batch, steps=steps),
        "empty": partial(time_engine, vlm, whole, batch=batch, steps=steps),
        "plan": partial(time_engine, vlm, kept, batch=batch, steps=steps, plan=plan),
    }

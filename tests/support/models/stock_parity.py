"""What tests do to hold a model equal to stock transformers: prompts, prefills of several at once, greedy text."""

from __future__ import annotations

from dataclasses import replace

import torch

from illava.decoder.prefill import prefill as packed_prefill
from illava.engine.prompt import assemble, pack
from illava.visual_tokens import TokenSpan


@torch.inference_mode()
def prompt_of(vlm, request, plan):
    return assemble(vlm.family, request, vlm.family.encode(request.media, plan, trace=False))


@torch.inference_mode()
def prefill(vlm, prompts, plan, *, traced=()):
    """One prefill of all prompts, whose cache is free again behind it."""
    cache, num_layers = vlm.engine.cache, vlm.family.decoder.num_layers
    for row, prompt in enumerate(prompts):
        cache.admit(row, [prompt.num_tokens] * num_layers)
    blocks = cache.batch(range(len(prompts)), [[0] * num_layers] * len(prompts))
    done = packed_prefill(
        vlm.family.decoder, pack(prompts), plan, cache, blocks, seeds=[0] * len(prompts), traced=traced
    )
    for row in range(len(prompts)):
        cache.free(row)
    return done


@torch.inference_mode()
def longer(vlm, prompt, token):
    """The prompt with a drawn token behind it, as text."""
    return replace(
        prompt,
        hidden_TD=torch.cat([prompt.hidden_TD, vlm.family.embed(torch.tensor([token]))]),
        position_PT=torch.cat([prompt.position_PT, prompt.next_position_P[:, None]], 1),
        coord_T4=torch.cat([prompt.coord_T4, torch.full((1, 4), -1)]),
        token_spans=(*prompt.token_spans, TokenSpan(1)),
        deepstack=tuple(torch.cat([layer, torch.zeros(1, layer.shape[1])]) for layer in prompt.deepstack),
        next_position_P=prompt.next_position_P + 1,
    )


@torch.inference_mode()
def stock_tokens(stock, inputs, num_new):
    """Greedy tokens of stock's ``generate``."""
    out = stock.generate(**inputs, max_new_tokens=num_new, do_sample=False)
    return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())

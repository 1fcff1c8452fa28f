"""PyramidDrop in the decoder: each layer's own last-token attention, recomputed with stock layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.engine.prompt import assemble
from illava.plan import EMPTY_PLAN, ReductionPlan

pytestmark = pytest.mark.numeric

LAYERS, KEEP = (1, 2, 3), 0.5


def rotate(x_HTd, cos_Td, sin_Td):
    left, right = x_HTd.chunk(2, -1)
    return x_HTd * cos_Td + torch.cat((-right, left), -1) * sin_Td


def slow_places(decoder, prompt) -> list[list[tuple[int, ...]]]:
    """The visual tokens' places after every step, by stock layers and an attention row written out."""
    hidden, position, place, kept = prompt.hidden_TD[None], prompt.position_PT, prompt.coord_T4, []
    for n, block in enumerate(decoder.layers):
        if n in LAYERS:
            cos, sin = (x[0] for x in decoder.rotary(hidden, position))
            normed, attention = block.input_layernorm(hidden)[0], block.self_attn
            q, k = (
                rotate(project(normed).unflatten(-1, (-1, decoder.head_dim)).transpose(0, 1), cos, sin)
                for project in (attention.q_proj, attention.k_proj)
            )
            k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
            row = (decoder.scale * torch.einsum("hd,htd->ht", q[:, -1], k)).softmax(-1).mean(0)
            visual_tokens = [t for t in range(len(place)) if place[t, 0] >= 0]
            best = sorted(visual_tokens, key=lambda t: -row[t])[: round(KEEP * len(visual_tokens))]
            stays = sorted({*best, *(t for t in range(len(place)) if t not in visual_tokens)})
            hidden, position, place = hidden[:, stays], position[:, stays], place[stays]
            kept.append([tuple(p) for p in place[place[:, 0] >= 0].tolist()])
        size = hidden.shape[1]
        mask = torch.full((size, size), float("-inf")).triu(1)[None, None]
        hidden = block(hidden, attention_mask=mask, position_embeddings=decoder.rotary(hidden, position))
    return kept


@torch.inference_mode()
def test_every_step_ranks_by_the_layer_about_to_run(onevision_folder):
    vlm = VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)
    pre, rng = load_preprocessor(str(onevision_folder)), np.random.default_rng(1)
    image = pre.images([rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)])[0]
    request = Request("a", ("See", image, "what is it?"), SamplingParams(max_new_tokens=2), trace=True)
    step = {"stage": "decoder_layer", "layers": LAYERS, "reducer": {"kind": "pyramiddrop", "keep_ratio": KEEP}}
    (done,) = vlm.generate([request], plan=ReductionPlan(steps=[step]))
    assert done.error is None
    prompt = assemble(vlm.family, request, vlm.family.encode([image], EMPTY_PLAN, trace=False))
    expected = slow_places(vlm.family.decoder, prompt)
    steps = [step for step in done.trace.steps if step.stage == "decoder_layer"]
    assert [[tuple(p) for p in step.coords.tolist()] for step in steps] == expected
    assert len(expected[-1]) < len(expected[0]) / 3

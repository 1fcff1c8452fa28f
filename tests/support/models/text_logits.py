"""Logits of a loaded family's decoder for some tokens, through our own prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from illava.decoder.kv_cache import PagedCache
from illava.decoder.prefill import prefill
from illava.engine.prompt import Prompt, pack
from illava.families.base import Family
from illava.plan import EMPTY_PLAN
from illava.visual_tokens import TokenSpan


@torch.inference_mode()
def text_logits(family: Family, *, num_tokens: int = 12, num_axes: int = 1) -> Tensor:
    """Behind ``num_tokens`` fixed tokens, above 64 of which the decoder's MLP runs in place on CPU: float32 [V]."""
    decoder = family.decoder
    cache = PagedCache(
        num_layers=decoder.num_layers,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        num_blocks=decoder.num_layers * (num_tokens // 16 + 2),
        block_size=16,
        dtype=decoder.dtype,
        device=decoder.device,
    )
    cache.admit(0, [num_tokens] * decoder.num_layers)
    draw = torch.Generator().manual_seed(3)
    hidden_TD = family.embed(torch.randint(decoder.num_tokens, (num_tokens,), generator=draw))
    position_PT = torch.arange(num_tokens).expand(num_axes, -1)
    coord_T4, size_T = torch.full((num_tokens, 4), -1), torch.ones(num_tokens)
    prompt = Prompt(hidden_TD, position_PT, coord_T4, size_T, (TokenSpan(num_tokens),), torch.tensor([num_tokens]))
    blocks = cache.batch([0], [[0] * decoder.num_layers])
    return prefill(decoder, pack([prompt]), EMPTY_PLAN, cache, blocks, seeds=[0]).logits_BV[0].float()

"""What the blocks of all Qwen vision towers share: attention behind a norm with 2-D rotary positions.

Sub-modules are borrowed from Hugging Face, none is patched or copied. Knows nothing of media or of the LLM behind.

Shape suffixes: T patches packed end to end, D channels, H heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from illava.attention.packed import packed_attention

Rotary = tuple[Tensor, Tensor]


def rotary_at(rotary: Any, hidden_TD: Tensor, place_T3: Tensor) -> Rotary:
    """Cosines and sines at each patch's true (row, col): float32 [T, 1, d] each."""
    cos_Td, sin_Td = rotary(hidden_TD, place_T3[:, 1:])
    return cos_Td.float()[:, None], sin_Td.float()[:, None]


def queries_keys_values(block: Any, hidden_TD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys, and values of one block: [T, H, d] each."""
    attention = block.attn
    qkv_T3Hd = attention.qkv(block.norm1(hidden_TD)).unflatten(1, (3, attention.num_heads, -1))
    q_THd, k_THd, v_THd = qkv_T3Hd.unbind(1)
    return _rotate(q_THd, *rotary), _rotate(k_THd, *rotary), v_THd


def attend(
    block: Any, hidden_TD: Tensor, rotary: Rotary, lengths: tuple[int, ...], key_bias_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One block up to its MLP: the residual stream with attention added, and the queries and keys that made it.

    Args:
        block: Hugging Face's.
        hidden_TD: what enters it.
        rotary: of `rotary_at`.
        lengths: patches per segment; attention stays within.
        key_bias_T: what every score of a key is raised by; None for nothing.
    """
    q_THd, k_THd, v_THd = queries_keys_values(block, hidden_TD, rotary)
    scale = block.attn.scaling
    mixed_THd = packed_attention(q_THd, k_THd, v_THd, lengths, causal=False, scale=scale, key_bias_T=key_bias_T)
    return hidden_TD + block.attn.proj(mixed_THd.flatten(1)), q_THd, k_THd


def _rotate(x_THd: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    """Half-split rotation in float32, as the borrowed model does it, in the input's dtype again."""
    left, right = x_THd.float().chunk(2, -1)
    rotated = torch.cat((left, right), -1) * cos_T1d + torch.cat((-right, left), -1) * sin_T1d
    return rotated.to(x_THd.dtype)

"""Holds what all Qwen vision towers share: native resolution, and blocks that attend with 2-D rotary positions.

Sub-modules are borrowed from Hugging Face; none is patched or copied.

Shape suffixes: T patches packed end to end, P patches, X values of a patch, K kept groups, D channels, H heads, d head
width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from illava.attention.packed import packed_attention_lse
from illava.decoder.layer_ops import rms_norm
from illava.families.qwen.geometry import PatchGrid
from illava.reduction.vision import VisionReduction

Rotary = tuple[Tensor, Tensor]


class NativeTower(ABC):
    """Runs all blocks of a tower over packed patches, and the merger.

    Attributes:
        num_blocks: blocks that are run.
        last_scored_block: the last block whose attention can score patches for later stages.
        has_cls: a CLS token precedes the patches of every segment; it is never reduced.
    """

    has_cls: ClassVar[bool] = False
    num_blocks: int
    last_scored_block: int

    def __init__(self, vision_model: Any) -> None:
        """Borrow the layers of a loaded tower."""
        self._patch_embed, self._rotary = vision_model.patch_embed, vision_model.rotary_pos_emb
        self._blocks, self._merger = vision_model.blocks, vision_model.merger
        self.num_blocks = len(vision_model.blocks)
        self.last_scored_block = self.num_blocks - 1

    def embed(self, patch_PX: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Embed patches as tokens: [P, X] normalised -> [T, D]."""
        return self._patch_embed(patch_PX)

    @abstractmethod
    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all blocks, reduced by the plan, and the merger: [T, D] -> [K, D], a vision token for each group.

        Some towers also give features of the same shape for decoder layers (deepstack).
        """


def rotary_at(rotary: Any, hidden_TD: Tensor, coord_T3: Tensor) -> Rotary:
    """Cosines and sines at each patch's true (row, col): float32 [T, 1, d] each."""
    cos_Td, sin_Td = rotary(hidden_TD, coord_T3[:, 1:])
    return cos_Td.float()[:, None], sin_Td.float()[:, None]


def queries_keys_values(block: Any, hidden_TD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys, and values of one block: [T, H, d] each."""
    attention = block.attn
    qkv_T3Hd = attention.qkv(rms_norm(block.norm1, hidden_TD)).unflatten(1, (3, attention.num_heads, -1))
    q_THd, k_THd, v_THd = qkv_T3Hd.unbind(1)
    return _rotate(q_THd, *rotary), _rotate(k_THd, *rotary), v_THd


def attend(
    block: Any, hidden_TD: Tensor, rotary: Rotary, lengths: tuple[int, ...], key_bias_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run a block up to its MLP: the residual stream with attention added, and what made it.

    That is queries, keys, and log-sum-exps of their scores where the attention gives them.

    Args:
        block: Hugging Face's.
        hidden_TD: the block's input.
        rotary: of `rotary_at`.
        lengths: patches per segment; attention stays within.
        key_bias_T: added to every score of a key; None adds nothing.
    """
    q_THd, k_THd, v_THd = queries_keys_values(block, hidden_TD, rotary)
    scale = block.attn.scaling
    mixed_THd, lse_HT = packed_attention_lse(
        q_THd, k_THd, v_THd, lengths, causal=False, scale=scale, key_bias_T=key_bias_T
    )
    return hidden_TD + block.attn.proj(mixed_THd.flatten(1)), q_THd, k_THd, lse_HT


def _rotate(x_THd: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    """Rotate half-split in float32, as the borrowed model does; returns the input's dtype."""
    left, right = x_THd.float().chunk(2, -1)
    rotated = torch.cat((left, right), -1) * cos_T1d + torch.cat((-right, left), -1) * sin_T1d
    return rotated.to(x_THd.dtype)

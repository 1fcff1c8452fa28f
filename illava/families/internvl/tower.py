"""Runs InternVL's tower: Hugging Face's own embeddings and layers, with the reduction inside each block.

Patches are put in the order of their groups behind the embeddings, so that the projector's pixel shuffle is a reshape.
A CLS token leads every tile. It takes part in all attention, and is dropped behind the last block.

Shape suffixes: F tiles, T tokens packed end to end, CLS tokens included; P patches of a tile, K kept groups, D
channels, H heads, d head width, W and H px.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from illava.attention.packed import packed_attention_lse
from illava.decoder.layer_ops import rms_norm
from illava.families.qwen.blocks import NativeTower
from illava.families.qwen.encoder import patch_coords
from illava.families.qwen.geometry import PatchGrid
from illava.host_copies import to_device
from illava.reduction.vision import VisionReduction


class InternVLTower(NativeTower):
    """Runs the tower of an `InternVLVisionModel`, and the projector behind it."""

    has_cls = True

    def __init__(self, vision_model: Any, projector: Any) -> None:
        """Borrow the layers of a loaded tower and projector."""
        self._embeddings, self._norm, self._merger = vision_model.embeddings, vision_model.layernorm, projector
        self._blocks = vision_model.encoder.layer
        self.num_blocks = len(self._blocks)
        self.last_scored_block = self.num_blocks - 1

    def embed(self, patch_PX: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Embed CLS and patches of every tile with their positions: [F, 3, H, W] normalised -> [T, D]."""
        hidden_FPD = self._embeddings(patch_PX)
        tile = PatchGrid(1, grids[0].rows, grids[0].cols, grids[0].side)
        place_P3 = patch_coords(tile)
        raster_P = place_P3[:, 1] * tile.cols + place_P3[:, 2]
        order = to_device(torch.cat([torch.zeros(1, dtype=torch.long), raster_P + 1]), hidden_FPD.device)
        return hidden_FPD.index_select(1, order).flatten(0, 1)

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `NativeTower.run`."""
        for index, block in enumerate(self._blocks):
            hidden_TD, q_THd, k_THd, lse_HT = _attend(block, hidden_TD, reduction.lengths, reduction.key_bias_T)
            hidden_TD = reduction.at(index, hidden_TD, q_THd, k_THd, scale=block.attention.scale, lse_HT=lse_HT)
            hidden_TD = hidden_TD + block.lambda_2 * block.mlp(_normed(block.layernorm_after, hidden_TD))
        hidden_TD = reduction.after_tower(self._norm(hidden_TD))
        return self._merger(hidden_TD.reshape(-1, self._merger.layer_norm.normalized_shape[0])), ()


def _attend(
    block: Any, hidden_TD: Tensor, lengths: tuple[int, ...], key_bias_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run a block up to its MLP: see `illava.families.qwen.blocks.attend`."""
    attention = block.attention
    normed_TD = _normed(block.layernorm_before, hidden_TD)
    q_TD, k_TD = (
        _normed(norm, project(normed_TD))
        for norm, project in ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj))
    )
    q_THd, k_THd, v_THd = (
        value_TD.unflatten(1, (attention.num_heads, attention.head_dim))
        for value_TD in (q_TD, k_TD, attention.v_proj(normed_TD))
    )
    mixed_THd, lse_HT = packed_attention_lse(
        q_THd, k_THd, v_THd, lengths, causal=False, scale=attention.scale, key_bias_T=key_bias_T
    )
    return hidden_TD + block.lambda_1 * attention.projection_layer(mixed_THd.flatten(1)), q_THd, k_THd, lse_HT


def _normed(norm: Any, x_TD: Tensor) -> Tensor:
    """Apply a borrowed norm of either kind (or none, where queries and keys have none)."""
    return rms_norm(norm, x_TD) if hasattr(norm, "variance_epsilon") else norm(x_TD)

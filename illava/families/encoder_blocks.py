"""The block loop of SigLIP and CLIP towers over Hugging Face's own layers, with the reduction called inside it.

Both have the same layer: attention behind a norm, MLP behind a norm. Sub-modules are borrowed, none is patched or
copied. Knows nothing of embeddings, media, layouts or the LLM behind.

Shape suffixes: T tokens packed end to end, K kept tokens, D channels, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from illava.attention import packed_attention
from illava.errors import ModelLoadError
from illava.vision import VisionReduction


def blocks_up_to(layers: Any, feature_layer: int) -> Any:
    """The blocks that lead to the hidden state a model reads.

    Args:
        layers: the tower's `ModuleList`.
        feature_layer: index into the hidden states, 0 being the embeddings, as ``vision_feature_layer`` counts.

    Raises:
        ModelLoadError: no such hidden state.
    """
    num_blocks = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
    if not 1 <= num_blocks <= len(layers):
        raise ModelLoadError(
            f"vision_feature_layer {feature_layer} asks for hidden state {num_blocks} of a tower of "
            f"{len(layers)} blocks; possible are 1 to {len(layers)} or -{len(layers)} to -1"
        )
    return layers[:num_blocks]


def run_blocks(blocks: Sequence[Any], hidden_TD: Tensor, reduction: VisionReduction) -> Tensor:
    """All blocks: [T, D] -> [K, D], reduced as the plan says. With an empty plan equal to Hugging Face's."""
    for index, block in enumerate(blocks):
        attention = block.self_attn
        normed_TD = block.layer_norm1(hidden_TD)
        q_THd, k_THd, v_THd = (
            project(normed_TD).unflatten(1, (attention.num_heads, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended_THd = packed_attention(
            q_THd,
            k_THd,
            v_THd,
            reduction.lengths,
            causal=False,
            scale=attention.scale,
            key_bias_T=reduction.key_bias_T,
        )
        hidden_TD = hidden_TD + attention.out_proj(attended_THd.flatten(1))
        hidden_TD = reduction.at(index, hidden_TD, q_THd, k_THd, scale=attention.scale)
        hidden_TD = hidden_TD + block.mlp(block.layer_norm2(hidden_TD))
    return reduction.after_tower(hidden_TD)

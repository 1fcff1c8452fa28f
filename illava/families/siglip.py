"""The SigLIP vision tower's block loop over Hugging Face's own layers, with the reduction called inside it.

Tokens of all tiles lie packed end to end, [T, D]; blocks may shorten them. Sub-modules are borrowed, none is patched
or copied. Knows nothing of media, layouts or the LLM behind it.

Shape suffixes: T tokens packed end to end, F tiles, D channels, H heads, d head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from illava.attention import packed_attention
from illava.errors import ModelLoadError
from illava.vision import VisionReduction


class SiglipTower:
    """Runs the blocks up to the hidden state a model reads; that state is taken before the tower's last norm.

    Attributes:
        num_blocks: blocks that are run.
        grid: patches per side of a tile.
    """

    def __init__(self, vision_model: Any, *, feature_layer: int = -1) -> None:
        """Borrow the layers of a `SiglipVisionModel`.

        Args:
            vision_model: the loaded module.
            feature_layer: index into the hidden states, 0 being the embeddings, as ``vision_feature_layer`` counts.

        Raises:
            ModelLoadError: no such hidden state.
        """
        layers = vision_model.encoder.layers
        self.num_blocks = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
        if not 1 <= self.num_blocks <= len(layers):
            raise ModelLoadError(
                f"vision_feature_layer {feature_layer} asks for hidden state {self.num_blocks} of a tower of "
                f"{len(layers)} blocks; possible are 1 to {len(layers)} or -{len(layers)} to -1"
            )
        self._embeddings = vision_model.embeddings
        self._blocks = layers[: self.num_blocks]
        self.grid = vision_model.embeddings.image_size // vision_model.embeddings.patch_size

    def embed(self, pixels_F3HW: Tensor) -> Tensor:
        """Patches with their position embeddings: [F, 3, H, W] normalised -> [T, D]."""
        return self._embeddings(pixels_F3HW).flatten(0, 1)

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> Tensor:
        """All blocks: [T, D] -> [K, D], reduced as the plan says. With an empty plan equal to Hugging Face's."""
        for index, block in enumerate(self._blocks):
            attention = block.self_attn
            normed_TD = block.layer_norm1(hidden_TD)
            q_THd, k_THd, v_THd = (
                project(normed_TD).unflatten(1, (attention.num_heads, attention.head_dim))
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            attended_THd = packed_attention(q_THd, k_THd, v_THd, reduction.lengths, causal=False, scale=attention.scale)
            hidden_TD = hidden_TD + attention.out_proj(attended_THd.flatten(1))
            hidden_TD = reduction.at(index, hidden_TD, q_THd, k_THd, scale=attention.scale)
            hidden_TD = hidden_TD + block.mlp(block.layer_norm2(hidden_TD))
        return reduction.after_tower(hidden_TD)

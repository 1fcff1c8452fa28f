"""The SigLIP vision tower: borrowed embeddings and the blocks behind them.

Tokens of all tiles lie packed end to end, [T, D]; blocks may shorten them. Knows nothing of media, layouts or the LLM
behind it.

Shape suffixes: T tokens packed end to end, K kept tokens, F tiles, D channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from illava.families.llava.towers import blocks_up_to, run_blocks
from illava.reduction.vision import VisionReduction


class SiglipTower:
    """Runs the blocks up to the hidden state a model reads; that state is taken before the tower's last norm.

    Attributes:
        has_cls: no token stands before the patches.
        num_blocks: blocks that are run.
        grid: patches per side of a tile.
    """

    has_cls = False

    def __init__(self, vision_model: Any, *, feature_layer: int = -1) -> None:
        """Borrow the layers of a `SiglipVisionModel`.

        Args:
            vision_model: the loaded module.
            feature_layer: index into the hidden states, 0 being the embeddings, as ``vision_feature_layer`` counts.

        Raises:
            ModelLoadError: no such hidden state.
        """
        self._embeddings = vision_model.embeddings
        self._blocks = blocks_up_to(vision_model.encoder.layers, feature_layer)
        self.num_blocks = len(self._blocks)
        self.grid = vision_model.embeddings.image_size // vision_model.embeddings.patch_size

    def embed(self, pixels_F3HW: Tensor) -> Tensor:
        """Patches with their position embeddings: [F, 3, H, W] normalised -> [T, D]."""
        return self._embeddings(pixels_F3HW).flatten(0, 1)

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> Tensor:
        """All blocks: [T, D] -> [K, D], reduced as the plan says. With an empty plan equal to Hugging Face's."""
        return run_blocks(self._blocks, hidden_TD, reduction)

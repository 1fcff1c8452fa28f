"""The CLIP vision tower: borrowed embeddings, the norm behind them, and the blocks.

Every tile begins with a CLS token that takes part in all attention and is never reduced; `VisionReduction` keeps it
apart and drops it behind the last block, as ``vision_feature_select_strategy: default`` does. Knows nothing of media,
layouts or the LLM behind it.

Shape suffixes: T tokens packed end to end, CLS tokens included; K kept patches, F tiles, D channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from illava.families.llava.towers import blocks_up_to, run_blocks
from illava.reduction.vision import VisionReduction


class ClipTower:
    """Runs the blocks up to the hidden state a model reads; that state is taken before the tower's last norm.

    Attributes:
        has_cls: a CLS token stands before the patches of every tile.
        num_blocks: blocks that are run.
        grid: patches per side of a tile.
    """

    has_cls = True

    def __init__(self, vision_model: Any, *, feature_layer: int = -2) -> None:
        """Borrow the layers of a `CLIPVisionModel`.

        Args:
            vision_model: the loaded module.
            feature_layer: index into the hidden states, 0 being the embeddings, as ``vision_feature_layer`` counts.

        Raises:
            ModelLoadError: no such hidden state.
        """
        inner = getattr(vision_model, "vision_model", vision_model)  # older transformers: one module deeper
        self._embeddings, self._norm = inner.embeddings, inner.pre_layrnorm
        self._blocks = blocks_up_to(inner.encoder.layers, feature_layer)
        self.num_blocks = len(self._blocks)
        self.grid = inner.embeddings.image_size // inner.embeddings.patch_size

    def embed(self, pixels_F3HW: Tensor) -> Tensor:
        """CLS and patches of every tile with their position embeddings, normed: [F, 3, H, W] normalised -> [T, D]."""
        return self._norm(self._embeddings(pixels_F3HW)).flatten(0, 1)

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> Tensor:
        """All blocks: [T, D] -> [K, D], reduced as the plan says. With an empty plan equal to stock's patches."""
        return run_blocks(self._blocks, hidden_TD, reduction)

"""Supports LLaVA-NeXT: CLIP tower, projector, anyres images, Llama, Mistral or another decoder of that shape.

It borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's. It reads
images only, and tiles each of several images. CLS takes part in the tower's attention and is never reduced.

Source: transformers 5.23, models/llava_next. The paper shows results for this family, but its release has no code for
it: where and how much to reduce is ours (`plan.py`, ``illava-next-image``).
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaNextForConditionalGeneration

from illava.families.base import Family
from illava.families.llava.encoder import TileEncoder
from illava.families.llava.plan_check import check_next
from illava.families.llava.towers import ClipTower, check_features
from illava.plan import ReductionPlan


class LlavaNext(Family):
    """Holds one loaded LLaVA-NeXT model.

    Attributes:
        geometry: tiles and grids.
    """

    model_class = LlavaNextForConditionalGeneration
    media_kinds = ("image",)
    tower: ClipTower
    encoder: TileEncoder

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See `Family.check_config`."""
        check_features(
            config,
            model="LLaVA-NeXT",
            tower="clip_vision_model",
            strategy="default",
            otherwise="keeps the CLS token, which fits no grid of patches",
        )

    def build_encoder(self, model: Any) -> tuple[ClipTower, TileEncoder]:
        """See `Family.build_encoder`."""
        inner = model.model
        self.geometry = self.preprocessor.geometry
        tower = ClipTower(inner.vision_tower, feature_layer=model.config.vision_feature_layer)
        return tower, TileEncoder(tower, inner.multi_modal_projector, inner.image_newline, self.preprocessor)

    def check_vision(self, plan: ReductionPlan) -> None:
        """See `Family.check_vision`."""
        check_next(plan, self.model_type, self.geometry, num_blocks=self.num_vision_blocks)

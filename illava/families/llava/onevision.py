"""Supports LLaVA-OneVision: SigLIP tower, projector, pooled video frames, anyres images, Qwen2 decoder.

It borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's.

Source: transformers 5.23, models/llava_onevision.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaOnevisionForConditionalGeneration

from illava.families.base import Family
from illava.families.llava.encoder import TileEncoder
from illava.families.llava.plan_check import check_onevision
from illava.families.llava.towers import SiglipTower, check_features
from illava.plan import ReductionPlan


class LlavaOnevision(Family):
    """Holds one loaded LLaVA-OneVision model.

    Attributes:
        geometry: tiles and grids.
    """

    model_class = LlavaOnevisionForConditionalGeneration
    tower: SiglipTower
    encoder: TileEncoder

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See `Family.check_config`."""
        check_features(
            config,
            model="LLaVA-OneVision",
            tower="siglip_vision_model",
            strategy="full",
            otherwise="drops the first token as CLS, but SigLIP has none",
        )

    def build_encoder(self, model: Any) -> tuple[SiglipTower, TileEncoder]:
        """See `Family.build_encoder`."""
        inner = model.model
        self.geometry = self.preprocessor.geometry
        tower = SiglipTower(inner.vision_tower, feature_layer=model.config.vision_feature_layer)
        return tower, TileEncoder(tower, inner.multi_modal_projector, inner.image_newline, self.preprocessor)

    def check_vision(self, plan: ReductionPlan) -> None:
        """See `Family.check_vision`."""
        check_onevision(plan, self.model_type, self.geometry, num_blocks=self.num_vision_blocks)

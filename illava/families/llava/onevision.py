"""Supports LLaVA-OneVision: SigLIP tower, projector, pooled video frames, anyres images, Qwen2 decoder.

It borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's.

Source: transformers 5.23, models/llava_onevision.
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaOnevisionForConditionalGeneration

from illava.errors import PlanError
from illava.families.base import Family
from illava.families.llava.encoder import TileEncoder
from illava.families.llava.towers import SiglipTower, check_features
from illava.families.plan_check import check_media, square_side, tokens_left
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
        check_media(plan, self.model_type)
        patches = self.geometry.grid**2
        left = tokens_left(plan, num_blocks=self.num_vision_blocks, tokens_per_tile=patches)
        side = square_side(left, tokens_per_tile=patches) if plan.layout == "released" else self.geometry.grid
        budget = plan.at("decoder_input")
        if budget is not None and budget.per == "frame":
            of_video = (-(-side // 2)) ** 2
            if all(budget.num_kept(count) == count for count in (of_video, left or patches)):
                raise PlanError(
                    f"{budget.kind!r} at decoder_input would remove nothing: a video frame enters the LLM as "
                    f"{of_video} tokens, one of several images as {left or patches}; lower its budget or drop the step"
                )

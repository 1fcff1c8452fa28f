"""Supports LLaVA-NeXT: CLIP tower, projector, anyres images, Llama, Mistral or another decoder of that shape.

It borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's. It reads
images only, and tiles each of several images. CLS takes part in the tower's attention and is never reduced.

Source: transformers 5.23, models/llava_next. The paper shows results for this family, but its release has no code for
it: where and how much to reduce is ours (`plan.py`, ``illava-next-image``).
"""

from __future__ import annotations

from typing import Any

from transformers import LlavaNextForConditionalGeneration

from illava.errors import PlanError
from illava.families.base import Family
from illava.families.llava.encoder import TileEncoder
from illava.families.llava.towers import ClipTower, check_features
from illava.families.plan_check import check_media, square_side, tokens_left
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
        check_media(plan, self.model_type, reads_videos=False)
        patches = self.geometry.grid**2
        left = tokens_left(
            plan, num_blocks=self.num_vision_blocks, tokens_per_tile=patches, has_cls=True, reads_videos=False
        )
        if plan.layout == "released":
            square_side(left, tokens_per_tile=patches)
        for step in plan.steps:
            if step.stage in ("decoder_input", "decoder_layer") and step.reducer.per == "frame":
                raise PlanError(
                    f"{step.reducer.kind!r} at {step.stage} keeps a count per frame, but llava_next has none: the "
                    "tiles of an image are read as one; set `per` to medium or prompt and give keep_ratio or num_merged"
                )

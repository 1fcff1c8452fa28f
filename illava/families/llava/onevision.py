"""LLaVA-OneVision: SigLIP tower, projector, pooled video frames, anyres images, Qwen2 decoder.

Borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's. Knows no
reducer: the tower's block loop calls the reduction, the layout behind it restores or re-reads what is left.

Source: transformers 5.23, models/llava_onevision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from illava.decoder.decoder import Decoder
from illava.errors import ModelLoadError, PlanError
from illava.families.base import Family, RenderedPrompt
from illava.families.chat_prompt import ChatPrompt
from illava.families.llava.encoder import TileEncoder
from illava.families.llava.siglip import SiglipTower
from illava.families.loading import load_tokenizer, load_weights, stop_token_ids
from illava.families.plan_check import check_media, square_side, tokens_left
from illava.plan import ReductionPlan
from illava.preprocess import Preprocessor, VisualInput, load_preprocessor
from illava.reduction.probe import AttentionProbe
from illava.visual_tokens import EncodedMedium


class LlavaOnevision(Family):
    """One loaded LLaVA-OneVision model.

    Attributes:
        tower: the vision tower's block loop.
        encoder: tiles to visual tokens.
        geometry: tiles and grids.
    """

    model_type = "llava_onevision"

    def __init__(self, model: Any, tokenizer: Any, preprocessor: Preprocessor) -> None:
        """Borrow a loaded model's modules.

        Args:
            model: a `LlavaOnevisionForConditionalGeneration`.
            tokenizer: with the chat template to use.
            preprocessor: of the same model folder; its geometry and normalisation are used.

        Raises:
            ModelLoadError: a vision tower or feature selection that this family does not have.
        """
        _check_config(model.config)
        inner = model.model
        self.decoder = Decoder(inner.language_model, model.lm_head)
        self.tower = SiglipTower(inner.vision_tower, feature_layer=model.config.vision_feature_layer)
        self.num_vision_blocks = self.tower.num_blocks
        self.stop_token_ids = stop_token_ids(model)
        self.geometry, self.preprocessor = preprocessor.geometry, preprocessor
        self._projector = inner.multi_modal_projector
        self.encoder = TileEncoder(self.tower, self._projector, inner.image_newline, preprocessor)
        self._embedding = inner.get_input_embeddings()
        self._tokenizer = tokenizer
        placeholders = {"image": model.config.image_token_id, "video": model.config.video_token_id}
        self._chat = ChatPrompt(tokenizer, placeholders)

    @classmethod
    def load(
        cls, model_id: str, *, revision: str | None, dtype: torch.dtype, device: torch.device | str
    ) -> LlavaOnevision:
        """Load from a local folder or the hub.

        Raises:
            ModelLoadError: see `illava.families.load_family`.
        """
        preprocessor = load_preprocessor(model_id, revision=revision)
        _check_config(LlavaOnevisionConfig.from_pretrained(model_id, revision=revision or "main"))
        tokenizer = load_tokenizer(model_id, revision=revision)
        model_class = LlavaOnevisionForConditionalGeneration
        model = load_weights(model_class, model_id, revision=revision, dtype=dtype, device=device)
        return cls(model, tokenizer, preprocessor)

    def check(self, plan: ReductionPlan) -> None:
        """See `Family.check`."""
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
        self.decoder.check(plan)

    def num_patches(self, medium: VisualInput) -> int:
        """See `Family.num_patches`."""
        return len(medium.tiles) * self.geometry.grid**2

    def num_vision_tokens(self, medium: VisualInput) -> int:
        """See `Family.num_vision_tokens`."""
        if medium.kind == "video":
            return self.geometry.num_video_tokens(len(medium.tiles))
        return self.geometry.num_image_tokens(*medium.original_size, num_tiles=len(medium.tiles))

    @torch.no_grad()
    def encode(
        self,
        media: Sequence[VisualInput],
        plan: ReductionPlan,
        *,
        trace: bool,
        seeds: Sequence[int] | None = None,
        probe: AttentionProbe | None = None,
    ) -> list[EncodedMedium]:
        """See `Family.encode`; the tower runs once over all tiles of all media."""
        return self.encoder.encode(media, plan, trace=trace, seeds=seeds, probe=probe)

    def render(self, content: Sequence[str | VisualInput], num_slots: Sequence[int]) -> RenderedPrompt:
        """See `Family.render`."""
        return self._chat.render(content, num_slots)

    def position_ids(self, prompt: RenderedPrompt, media: Sequence[VisualInput]) -> Tensor:
        """See `Family.position_ids`; Qwen2 counts slots."""
        return torch.arange(len(prompt.token_ids), device=self.decoder.device)[None]


def _check_config(config: Any) -> None:
    """Refuse configurations whose features this family does not compute."""
    tower, strategy, layer = (
        config.vision_config.model_type,
        config.vision_feature_select_strategy,
        config.vision_feature_layer,
    )
    if tower != "siglip_vision_model":
        raise ModelLoadError(f"this LLaVA-OneVision has a {tower!r} vision tower; supported is 'siglip_vision_model'")
    if strategy != "full":
        raise ModelLoadError(
            f"vision_feature_select_strategy {strategy!r} drops the first token as CLS, but SigLIP has none "
            "(transformers fails on it, too); set it to 'full' in config.json"
        )
    if not isinstance(layer, int):
        raise ModelLoadError(
            f"vision_feature_layer {layer} joins several hidden states, which have different lengths under reduction; "
            "only models that read one are supported"
        )

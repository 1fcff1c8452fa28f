"""LLaVA-NeXT: CLIP tower, projector, anyres images, Llama, Mistral or another decoder of that shape. Images only.

Borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's. Every image
is tiled, of several too; CLS takes part in the tower's attention and is never reduced. Knows no reducer.

Source: transformers 5.23, models/llava_next. The paper shows results for this family, but its release has no code for
it: where and how much to reduce is ours (`plan.py`, ``illava-next-image``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from illava.decoder.decoder import Decoder
from illava.errors import ModelLoadError, PlanError
from illava.families.base import Family, RenderedPrompt
from illava.families.chat_prompt import ChatPrompt
from illava.families.llava.clip import ClipTower
from illava.families.llava.encoder import TileEncoder
from illava.families.loading import load_tokenizer, load_weights, stop_token_ids
from illava.families.plan_check import check_media, square_side, tokens_left
from illava.plan import ReductionPlan
from illava.preprocess import Preprocessor, VisualInput, load_preprocessor
from illava.reduction.probe import AttentionProbe
from illava.visual_tokens import EncodedMedium


class LlavaNext(Family):
    """One loaded LLaVA-NeXT model.

    Attributes:
        tower: the vision tower's block loop.
        encoder: tiles to visual tokens.
        geometry: tiles and grids.
    """

    model_type = "llava_next"

    def __init__(self, model: Any, tokenizer: Any, preprocessor: Preprocessor) -> None:
        """Borrow a loaded model's modules.

        Args:
            model: a `LlavaNextForConditionalGeneration`.
            tokenizer: with the chat template to use.
            preprocessor: of the same model folder; its geometry and normalisation are used.

        Raises:
            ModelLoadError: a vision tower or feature selection that this family does not have.
        """
        _check_config(model.config)
        inner = model.model
        self.decoder = Decoder(inner.language_model, model.lm_head)
        self.tower = ClipTower(inner.vision_tower, feature_layer=model.config.vision_feature_layer)
        self.num_vision_blocks = self.tower.num_blocks
        self.stop_token_ids = stop_token_ids(model)
        self.geometry, self.preprocessor = preprocessor.geometry, preprocessor
        self.encoder = TileEncoder(self.tower, inner.multi_modal_projector, inner.image_newline, preprocessor)
        self._embedding = inner.get_input_embeddings()
        self._tokenizer = tokenizer
        self._chat = ChatPrompt(tokenizer, {"image": model.config.image_token_id})

    @classmethod
    def load(cls, model_id: str, *, revision: str | None, dtype: torch.dtype, device: torch.device | str) -> LlavaNext:
        """Load from a local folder or the hub.

        Raises:
            ModelLoadError: see `illava.families.load_family`.
        """
        preprocessor = load_preprocessor(model_id, revision=revision)
        _check_config(LlavaNextConfig.from_pretrained(model_id, revision=revision or "main"))
        tokenizer = load_tokenizer(model_id, revision=revision)
        model_class = LlavaNextForConditionalGeneration
        model = load_weights(model_class, model_id, revision=revision, dtype=dtype, device=device)
        return cls(model, tokenizer, preprocessor)

    def check(self, plan: ReductionPlan) -> None:
        """See `Family.check`."""
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
        self.decoder.check(plan)

    def num_patches(self, medium: VisualInput) -> int:
        """See `Family.num_patches`; CLS tokens are not counted."""
        return len(medium.tiles) * self.geometry.grid**2

    def num_vision_tokens(self, medium: VisualInput) -> int:
        """See `Family.num_vision_tokens`."""
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
        """See `Family.encode`; the tower runs once over all tiles of all images."""
        return self.encoder.encode(media, plan, trace=trace, seeds=seeds, probe=probe)

    def render(self, content: Sequence[str | VisualInput], num_slots: Sequence[int]) -> RenderedPrompt:
        """See `Family.render`."""
        return self._chat.render(content, num_slots)

    def position_ids(self, prompt: RenderedPrompt, media: Sequence[VisualInput]) -> Tensor:
        """See `Family.position_ids`; the decoder counts slots."""
        return torch.arange(len(prompt.token_ids), device=self.decoder.device)[None]


def _check_config(config: Any) -> None:
    """Refuse configurations whose features this family does not compute."""
    tower, strategy, layer = (
        config.vision_config.model_type,
        config.vision_feature_select_strategy,
        config.vision_feature_layer,
    )
    if tower != "clip_vision_model":
        raise ModelLoadError(f"this LLaVA-NeXT has a {tower!r} vision tower; supported is 'clip_vision_model'")
    if strategy != "default":
        raise ModelLoadError(
            f"vision_feature_select_strategy {strategy!r} keeps the CLS token, which fits no grid of patches "
            "(transformers fails on it, too); set it to 'default' in config.json"
        )
    if not isinstance(layer, int):
        raise ModelLoadError(
            f"vision_feature_layer {layer} joins several hidden states, which have different lengths under reduction; "
            "only models that read one are supported"
        )

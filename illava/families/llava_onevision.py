"""LLaVA-OneVision: SigLIP tower, projector, pooled video frames, anyres images, Qwen2 decoder.

Borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's. Knows no
reducer: the tower's block loop calls the reduction, the layout behind it restores or re-reads what is left.

Source: transformers 5.23, models/llava_onevision.

Shape suffixes: F tiles, R rows, C columns, K kept tokens, D channels, P patches, H height and W width in px.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from illava.decoder import Decoder
from illava.errors import ModelLoadError, PlanError, RequestError
from illava.families.base import EncodedMedium, Family, RenderedPrompt
from illava.families.chat_prompt import ChatPrompt
from illava.families.onevision_medium import Survivors, lay_out, patch_places
from illava.families.plan_check import square_side, tokens_left
from illava.families.pretrained import load_tokenizer, load_weights, stop_token_ids
from illava.families.siglip import SiglipTower
from illava.geometry import fill_gaps, owners
from illava.plan import ReductionPlan
from illava.preprocess import Preprocessor, VisualInput, load_preprocessor
from illava.vision import VisionReduction


class LlavaOnevision(Family):
    """One loaded LLaVA-OneVision model.

    Attributes:
        tower: the vision tower's block loop.
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
        self.geometry = preprocessor.geometry
        self._projector = inner.multi_modal_projector
        self._newline_D = inner.image_newline
        self._embedding = inner.get_input_embeddings()
        self._preprocessor = preprocessor
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
        if plan.at("media") is not None:
            raise PlanError("stage 'media' does not exist for llava_onevision; the first is 'vision_block'")
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
    def encode(self, media: Sequence[VisualInput], plan: ReductionPlan, *, trace: bool) -> list[EncodedMedium]:
        """See `Family.encode`; the tower runs once over all tiles of all media."""
        if not media:
            return []
        grid, device = self.geometry.grid, self._newline_D.device
        num_tiles = [len(medium.tiles) for medium in media]
        place_P3 = torch.cat([patch_places(count, grid) for count in num_tiles]).to(device)
        lengths = (grid**2,) * sum(num_tiles)
        reduction = VisionReduction(plan, lengths, place_P3, num_blocks=self.num_vision_blocks)
        feature_KD = self._projector(self.tower.run(self.tower.embed(self._pixels(media)), reduction))
        owner_FRC = None
        if plan.layout == "geometric" and reduction.steps:
            owner_P = owners([step.assignment for step in reduction.steps], place_P3.shape[0], device)
            owner_FRC = fill_gaps(owner_P.view(-1, grid, grid))
        parts = _apart(feature_KD, reduction, owner_FRC, num_tiles, trace=trace)
        return [
            lay_out(part, medium, self.geometry, self._newline_D) for part, medium in zip(parts, media, strict=True)
        ]

    def render(self, content: Sequence[str | VisualInput], num_slots: Sequence[int]) -> RenderedPrompt:
        """See `Family.render`."""
        return self._chat.render(content, num_slots)

    def position_ids(self, prompt: RenderedPrompt, media: Sequence[VisualInput]) -> Tensor:
        """See `Family.position_ids`; Qwen2 counts slots."""
        return torch.arange(len(prompt.token_ids), device=self._newline_D.device)[None]

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `Family.embed`."""
        return self._embedding(token_ids)

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """See `Family.decode_text`."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def _pixels(self, media: Sequence[VisualInput]) -> Tensor:
        """All tiles, rescaled and normalised on the device: float32 [F, 3, H, W]."""
        side, prep = self.geometry.tile_px, self._preprocessor
        for medium in media:
            if medium.tiles.dtype != np.uint8 or medium.tiles.shape[1:] != (side, side, 3):
                raise RequestError(
                    f"a medium has tiles {medium.tiles.dtype} {list(medium.tiles.shape)}, this model takes uint8 "
                    f"[n, {side}, {side}, 3]; was it prepared by another model's preprocessor?"
                )
        tiles_FHW3 = torch.from_numpy(np.concatenate([medium.tiles for medium in media])).to(self._newline_D.device)
        mean_3HW, std_3HW = (tiles_FHW3.new_tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (prep.mean, prep.std))
        # transformers rescales in float64 and normalises in float32: so do we, for equal bits
        pixels_F3HW = tiles_FHW3.permute(0, 3, 1, 2).double().mul_(prep.rescale_factor).float()
        return pixels_F3HW.sub_(mean_3HW).div_(std_3HW).contiguous()


def _apart(
    feature_KD: Tensor, reduction: VisionReduction, owner_FRC: Tensor | None, num_tiles: Sequence[int], *, trace: bool
) -> list[Survivors]:
    """Each medium's share of the packed result; owners are renumbered to count from its own first token."""
    tile_bounds = list(accumulate(num_tiles, initial=0))
    token_ends = list(accumulate(reduction.lengths, initial=0))
    steps = reduction.trace(num_tiles) if trace else [None] * len(num_tiles)
    parts = []
    for (first, last), own_steps in zip(pairwise(tile_bounds), steps, strict=True):
        own = slice(token_ends[first], token_ends[last])
        parts.append(
            Survivors(
                feature_KD[own],
                None if reduction.score_T is None else reduction.score_T[own],
                reduction.place_T3[own],
                None if owner_FRC is None else owner_FRC[first:last] - own.start,
                own_steps,
            )
        )
    return parts


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

"""Qwen2-VL: a tower of native resolution, a merger of 2x2 patches, and Qwen2 with M-RoPE.

Borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's. Reduction
works on whole 2x2 groups; survivors keep their rotary and M-RoPE positions, and every temporal patch of a video is a
segment of its own. Knows no reducer.

Source: transformers 5.23, models/qwen2_vl. The released code of iLLaVA keeps only the first temporal patch of a video,
gives survivors the first raster positions and tears groups apart; none of that is reproduced.

Shape suffixes: T patches packed end to end, P patches, X values of a patch, K kept groups, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from illava.decoder.decoder import Decoder
from illava.families.base import Family, RenderedPrompt
from illava.families.chat_prompt import ChatPrompt
from illava.families.loading import load_tokenizer, load_weights, stop_token_ids
from illava.families.plan_check import check_native_resolution
from illava.families.qwen.blocks import attend, rotary_at
from illava.families.qwen.encoder import NativeEncoder
from illava.families.qwen.geometry import PatchGrid
from illava.families.qwen.mrope import TokenGrid, mrope_positions
from illava.plan import ReductionPlan
from illava.preprocess import Preprocessor, VisualInput, load_preprocessor
from illava.reduction.probe import AttentionProbe
from illava.reduction.vision import VisionReduction
from illava.visual_tokens import EncodedMedium


class Qwen2VLTower:
    """Runs all blocks and the merger.

    Attributes:
        num_blocks: blocks that are run.
        last_scored_block: the last whose attention can score patches for later stages.
    """

    def __init__(self, visual: Any) -> None:
        """Borrow the layers of a `Qwen2VisionTransformerPretrainedModel`."""
        self._patch_embed, self._rotary = visual.patch_embed, visual.rotary_pos_emb
        self._blocks, self._merger = visual.blocks, visual.merger
        self.num_blocks = len(visual.blocks)
        self.last_scored_block = self.num_blocks - 1

    def embed(self, patch_PX: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Patches as tokens: [P, X] normalised -> [T, D]."""
        return self._patch_embed(patch_PX)

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All blocks, reduced as the plan says, and the merger: [T, D] -> [K, D], a vision token for each group."""
        place_T3 = None
        for index, block in enumerate(self._blocks):
            if place_T3 is not reduction.place_T3:  # survivors rotate by their own places
                place_T3 = reduction.place_T3
                rotary = rotary_at(self._rotary, hidden_TD, place_T3)
            hidden_TD, q_THd, k_THd = attend(block, hidden_TD, rotary, reduction.lengths, reduction.key_bias_T)
            hidden_TD = reduction.at(index, hidden_TD, q_THd, k_THd, scale=block.attn.scaling)
            hidden_TD = hidden_TD + block.mlp(block.norm2(hidden_TD))
        return self._merger(reduction.after_tower(hidden_TD)), ()


class Qwen2VL(Family):
    """One loaded Qwen2-VL model.

    Attributes:
        tower: the vision tower's block loop.
        encoder: pictures to vision tokens.
    """

    model_type = "qwen2_vl"

    def __init__(self, model: Any, tokenizer: Any, preprocessor: Preprocessor) -> None:
        """Borrow a loaded model's modules.

        Args:
            model: a `Qwen2VLForConditionalGeneration`.
            tokenizer: with the chat template to use.
            preprocessor: of the same model folder; its geometry and normalisation are used.
        """
        inner = model.model
        self.decoder = Decoder(inner.language_model, model.lm_head)
        self.tower = Qwen2VLTower(inner.visual)
        self.num_vision_blocks = self.tower.num_blocks
        self.stop_token_ids = stop_token_ids(model)
        self.preprocessor = preprocessor
        self.encoder = NativeEncoder(self.tower, preprocessor, self.decoder.device)
        self._embedding = inner.get_input_embeddings()
        self._tokenizer = tokenizer
        placeholders = {"image": model.config.image_token_id, "video": model.config.video_token_id}
        self._chat = ChatPrompt(tokenizer, placeholders)

    @classmethod
    def load(cls, model_id: str, *, revision: str | None, dtype: torch.dtype, device: torch.device | str) -> Qwen2VL:
        """Load from a local folder or the hub.

        Raises:
            ModelLoadError: see `illava.families.load_family`.
        """
        preprocessor = load_preprocessor(model_id, revision=revision)
        tokenizer = load_tokenizer(model_id, revision=revision)
        model_class = Qwen2VLForConditionalGeneration
        model = load_weights(model_class, model_id, revision=revision, dtype=dtype, device=device)
        return cls(model, tokenizer, preprocessor)

    def check(self, plan: ReductionPlan) -> None:
        """See `Family.check`."""
        check_native_resolution(plan, self.model_type, num_blocks=self.num_vision_blocks)
        self.decoder.check(plan)

    def num_patches(self, medium: VisualInput) -> int:
        """See `Family.num_patches`."""
        return self.encoder.grid(medium).num_patches

    def num_vision_tokens(self, medium: VisualInput) -> int:
        """See `Family.num_vision_tokens`."""
        return self.encoder.grid(medium).num_groups

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
        """See `Family.encode`; the tower runs once over all media."""
        return self.encoder.encode(media, plan, trace=trace, seeds=seeds, probe=probe)

    def render(self, content: Sequence[str | VisualInput], num_slots: Sequence[int]) -> RenderedPrompt:
        """See `Family.render`."""
        return self._chat.render(content, num_slots)

    def position_ids(self, prompt: RenderedPrompt, media: Sequence[VisualInput]) -> Tensor:
        """See `Family.position_ids`: three axes."""
        grids = []
        for (start, _), medium in zip(prompt.spans, media, strict=True):
            grid = self.encoder.grid(medium)
            grids.append(TokenGrid(start, grid.times, *grid.groups))
        return mrope_positions(len(prompt.token_ids), grids)

"""Supports Qwen2-VL: a tower of native resolution, a merger of 2x2 patches, and Qwen2 with M-RoPE.

It borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's. Reduction
works on whole 2x2 groups. Kept tokens keep their rotary and M-RoPE positions, and every temporal patch of a video is a
segment of its own.

Source: transformers 5.23, models/qwen2_vl. The released code of iLLaVA keeps only the first temporal patch of a video,
gives kept tokens the first raster positions and tears groups apart; none of that is reproduced.

Shape suffixes: T patches packed end to end, K kept groups, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from illava.families.base import Family
from illava.families.chat_prompt import RenderedPrompt
from illava.families.qwen.blocks import NativeTower, attend, rotary_at
from illava.families.qwen.encoder import NativeEncoder
from illava.families.qwen.mrope import TokenGrid, mrope_positions
from illava.families.qwen.plan_check import check_qwen
from illava.plan import ReductionPlan
from illava.preprocess import VisualInput
from illava.reduction.vision import VisionReduction


class Qwen2VLTower(NativeTower):
    """Runs the tower of a `Qwen2VisionTransformerPretrainedModel`, whose blocks all attend over a whole segment."""

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `NativeTower.run`."""
        coord_T3 = None
        for index, block in enumerate(self._blocks):
            if coord_T3 is not reduction.coord_T3:  # kept tokens rotate by their own coordinates
                coord_T3 = reduction.coord_T3
                rotary = rotary_at(self._rotary, hidden_TD, coord_T3)
            hidden_TD, q_THd, k_THd, lse_HT = attend(block, hidden_TD, rotary, reduction.lengths, reduction.key_bias_T)
            hidden_TD = reduction.at(index, hidden_TD, q_THd, k_THd, scale=block.attn.scaling, lse_HT=lse_HT)
            hidden_TD = hidden_TD + block.mlp(block.norm2(hidden_TD))
        return self._merger(reduction.after_tower(hidden_TD)), ()


class Qwen2VL(Family):
    """Holds one loaded Qwen2-VL model."""

    model_class = Qwen2VLForConditionalGeneration
    tower: Qwen2VLTower
    encoder: NativeEncoder

    def build_encoder(self, model: Any) -> tuple[Qwen2VLTower, NativeEncoder]:
        """See `Family.build_encoder`."""
        tower = Qwen2VLTower(model.model.visual)
        return tower, NativeEncoder(tower, self.preprocessor, self.decoder.device)

    def check_vision(self, plan: ReductionPlan) -> None:
        """See `Family.check_vision`."""
        check_qwen(plan, self.model_type, self.preprocessor.geometry, num_blocks=self.num_vision_blocks)

    def position_ids(self, prompt: RenderedPrompt, media: Sequence[VisualInput]) -> Tensor:
        """See `Family.position_ids`: three axes."""
        grids = []
        for (start, _), mm_item in zip(prompt.spans, media, strict=True):
            grid = self.encoder.grid(mm_item)
            grids.append(TokenGrid(start, grid.times, *grid.groups))
        return mrope_positions(len(prompt.token_ids), grids)

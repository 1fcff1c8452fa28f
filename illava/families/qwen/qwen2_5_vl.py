"""Supports Qwen2.5-VL: Qwen2-VL with windowed attention in most blocks, and video positions that follow time.

It borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's. Reduction
works on whole 2x2 groups, in full-attention blocks only: attention within a window says little about the picture. After
a reduction the windows are those of the kept tokens' true coordinates.

Source: transformers 5.23, models/qwen2_5_vl.

Shape suffixes: T patches packed end to end, K kept groups, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from illava.decoder.layer_ops import rms_norm
from illava.families.base import Family
from illava.families.chat_prompt import RenderedPrompt
from illava.families.qwen.blocks import NativeTower, Rotary, attend, rotary_at
from illava.families.qwen.encoder import NativeEncoder
from illava.families.qwen.mrope import TokenGrid, mrope_positions
from illava.families.qwen.plan_check import check_windowed
from illava.host_copies import to_device
from illava.plan import ReductionPlan
from illava.preprocess import Preprocessor, VisualInput
from illava.reduction.vision import VisionReduction


@dataclass(frozen=True, slots=True)
class _Windows:
    """Sorts kept patches by the windows that their true coordinates lie in.

    Attributes:
        order_T: int64, the patch at each index of the order by windows.
        back_T: int64, the index of each patch in that order.
        lengths: patches of each window that holds any, host integers.
        rotary: rotary tables of the patches in this order.
        key_bias_T: their `VisionReduction.key_bias_T` in this order.
    """

    order_T: Tensor
    back_T: Tensor
    lengths: tuple[int, ...]
    rotary: Rotary
    key_bias_T: Tensor | None


class Qwen25VLTower(NativeTower):
    """Runs the tower of a `Qwen2_5_VisionTransformerPretrainedModel`, most of whose blocks attend within windows.

    Attributes:
        full_blocks: blocks that attend over a whole segment, ascending; only these can reduce.
        window_patches: patches per side of a window.
        last_scored_block: the last of the full blocks.
    """

    def __init__(self, vision_model: Any) -> None:
        """Borrow its layers."""
        super().__init__(vision_model)
        self.full_blocks = tuple(sorted(vision_model.fullatt_block_indexes))
        self.last_scored_block = self.full_blocks[-1]
        groups = vision_model.window_size // vision_model.spatial_merge_size // vision_model.patch_size
        self.window_patches = groups * vision_model.spatial_merge_size

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `NativeTower.run`.

        Patches are sorted by windows in windowed blocks, and in their own order in the full blocks between.
        """
        coord_T3, windowed = None, False
        for index, block in enumerate(self._blocks):
            if coord_T3 is not reduction.coord_T3:
                coord_T3 = reduction.coord_T3
                rotary = rotary_at(self._rotary, hidden_TD, coord_T3)
                windows = self._windows(reduction, rotary)
            if index not in self.full_blocks:
                hidden_TD, windowed = hidden_TD if windowed else hidden_TD[windows.order_T], True
                hidden_TD, *_ = attend(block, hidden_TD, windows.rotary, windows.lengths, windows.key_bias_T)
            else:
                hidden_TD, windowed = hidden_TD[windows.back_T] if windowed else hidden_TD, False
                own = attend(block, hidden_TD, rotary, reduction.lengths, reduction.key_bias_T)
                hidden_TD, q_THd, k_THd, lse_HT = own
                hidden_TD = reduction.at(index, hidden_TD, q_THd, k_THd, scale=block.attn.scaling, lse_HT=lse_HT)
            hidden_TD = hidden_TD + block.mlp(rms_norm(block.norm2, hidden_TD))
        hidden_TD = hidden_TD[windows.back_T] if windowed else hidden_TD
        return self._merger(reduction.after_tower(hidden_TD)), ()

    def _windows(self, reduction: VisionReduction, rotary: Rotary) -> _Windows:
        """Find the windows of the present patches; waits for the device, once a reduction.

        Source: transformers 5.23, vision_utils.py:get_vision_window_index; ragged where patches are gone.
        """
        coord_T3, lengths = reduction.coord_T3, reduction.lengths
        segment_T = to_device(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), coord_T3.device)
        window_T3 = torch.cat([segment_T[:, None], coord_T3[:, 1:] // self.window_patches], 1)
        _, window_T, count_W = window_T3.unique(dim=0, return_inverse=True, return_counts=True)
        order_T = torch.argsort(window_T, stable=True)
        cos_T1d, sin_T1d = rotary
        rotary, bias_T = (cos_T1d[order_T], sin_T1d[order_T]), reduction.key_bias_T
        if bias_T is not None:
            bias_T = bias_T[order_T]
        return _Windows(order_T, torch.argsort(order_T), tuple(count_W.tolist()), rotary, bias_T)


class Qwen25VL(Family):
    """Holds one loaded Qwen2.5-VL model."""

    model_class = Qwen2_5_VLForConditionalGeneration
    tower: Qwen25VLTower
    encoder: NativeEncoder

    def __init__(self, model: Any, tokenizer: Any, preprocessor: Preprocessor) -> None:
        """See `Family`."""
        super().__init__(model, tokenizer, preprocessor)
        self._tokens_per_second = model.config.vision_config.tokens_per_second
        self._frames_per_patch = preprocessor.geometry.frames_per_patch

    def build_encoder(self, model: Any) -> tuple[Qwen25VLTower, NativeEncoder]:
        """See `Family.build_encoder`."""
        tower = Qwen25VLTower(model.model.visual)
        return tower, NativeEncoder(tower, self.preprocessor, self.decoder.device)

    def check_vision(self, plan: ReductionPlan) -> None:
        """See `Family.check_vision`."""
        check_windowed(
            plan,
            self.model_type,
            self.preprocessor.geometry,
            num_blocks=self.num_vision_blocks,
            full_blocks=self.tower.full_blocks,
        )

    def position_ids(self, prompt: RenderedPrompt, media: Sequence[VisualInput]) -> Tensor:
        """See `Family.position_ids`: three axes; a video's time axis advances with its frames' seconds."""
        grids = []
        for (start, _), mm_item in zip(prompt.spans, media, strict=True):
            grid = self.encoder.grid(mm_item)
            interval = self._tokens_per_second * seconds_per_time(mm_item, self._frames_per_patch)
            grids.append(TokenGrid(start, grid.times, *grid.groups, interval))
        return mrope_positions(len(prompt.token_ids), grids)


def seconds_per_time(mm_item: VisualInput, frames_per_patch: int) -> float:
    """Seconds from one temporal patch of a video to the next; 1, as in transformers, if they are not known."""
    times_s = mm_item.timestamps_s
    if len(times_s) < 2:
        return 1.0
    return frames_per_patch * (times_s[-1] - times_s[0]) / (len(times_s) - 1)

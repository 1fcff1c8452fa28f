"""Supports Qwen3-VL, dense: a tower of native resolution with deepstack, Qwen3 with M-RoPE, a time before every frame.

It borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's. Reduction
works on whole 2x2 groups. Every later reduction applies to deepstack features, too, up to the decoder layers that they
are added behind. The times between a video's frames are text and stay; its frames are still one visual input.

Source: transformers 5.23, models/qwen3_vl.

Shape suffixes: T patches packed end to end, P patches, X values of a patch, K kept groups, D channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from illava.errors import ModelLoadError
from illava.families.base import Family
from illava.families.chat_prompt import RenderedPrompt, media_of
from illava.families.qwen.blocks import NativeTower, attend, rotary_at
from illava.families.qwen.encoder import NativeEncoder
from illava.families.qwen.geometry import PatchGrid
from illava.families.qwen.mrope import TokenGrid, mrope_positions
from illava.families.qwen.plan_check import check_qwen
from illava.host_copies import on_device
from illava.plan import ReductionPlan
from illava.preprocess import Preprocessor, VisualInput
from illava.reduction.vision import VisionReduction
from illava.requests import Message
from illava.tokens import merge

# Assumed frames per second of a video without timestamps, as in transformers.
_ASSUMED_FPS = 24


class Qwen3VLTower(NativeTower):
    """Runs the tower of a `Qwen3VLVisionModel`; mergers behind some blocks give the deepstack features."""

    def __init__(self, vision_model: Any) -> None:
        """Borrow its layers."""
        super().__init__(vision_model)
        blocks = getattr(vision_model, "deepstack_visual_indexes", ())  # Qwen3.5's tower is this one without deepstack
        self._deepstack = dict(zip(blocks, getattr(vision_model, "deepstack_merger_list", ()), strict=True))
        self._positions, self._positions_per_side = vision_model.pos_embed, vision_model.num_grid_per_side

    def embed(self, patch_PX: Tensor, grids: Sequence[PatchGrid]) -> Tensor:
        """Embed patches as tokens, with learned positions stretched over each picture: [P, X] normalised -> [T, D]."""
        hidden_PD = self._patch_embed(patch_PX)
        index_P4, weight_P4 = get_vision_interpolation_indices_and_weights(
            on_device([[grid.times, grid.rows, grid.cols] for grid in grids], hidden_PD.device),
            num_grid_per_side=self._positions_per_side,
            mode="bilinear",
            align_corners=True,
            spatial_merge_size=grids[0].side,
        )
        position_PD = (self._positions(index_P4) * weight_P4[:, :, None]).sum(1)
        return hidden_PD + position_PD.to(hidden_PD.dtype)

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run all blocks, reduced by the plan, and the mergers: [T, D] -> [K, D], and as much for each deepstack.

        Deepstack features of an early block go through every later reduction together with their tokens. If the plan
        unmerges, they are of the whole grid from the start.
        """
        deepstack: list[Tensor] = []
        coord_T3, num_steps = None, len(reduction.steps)  # steps before the blocks are applied to these tokens already
        for index, block in enumerate(self._blocks):
            if coord_T3 is not reduction.coord_T3:  # kept tokens rotate by their own coordinates
                coord_T3 = reduction.coord_T3
                rotary = rotary_at(self._rotary, hidden_TD, coord_T3)
            hidden_TD, q_THd, k_THd, lse_HT = attend(block, hidden_TD, rotary, reduction.lengths, reduction.key_bias_T)
            hidden_TD = reduction.at(index, hidden_TD, q_THd, k_THd, scale=block.attn.scaling, lse_HT=lse_HT)
            if not reduction.unmerges:
                deepstack, num_steps = _follow(deepstack, reduction, num_steps)
            hidden_TD = hidden_TD + block.mlp(block.norm2(hidden_TD))
            if index in self._deepstack:
                deepstack.append(self._deepstack[index](reduction.unmerged(hidden_TD)))
        hidden_TD = reduction.after_tower(hidden_TD)
        deepstack, _ = _follow(deepstack, reduction, num_steps)
        return self._merger(hidden_TD), tuple(deepstack)


def _follow(deepstack: list[Tensor], reduction: VisionReduction, num_steps: int) -> tuple[list[Tensor], int]:
    """Apply the reductions since step ``num_steps`` to deepstack features; also returns the number of steps now."""
    for step in reduction.steps[num_steps:]:
        deepstack = [merge(step.of_groups, feature_KD) for feature_KD in deepstack]
    return deepstack, len(reduction.steps)


class Qwen3VL(Family):
    """Holds one loaded Qwen3-VL model."""

    model_class: ClassVar[Any] = Qwen3VLForConditionalGeneration
    tower: Qwen3VLTower
    encoder: NativeEncoder

    def __init__(self, model: Any, tokenizer: Any, preprocessor: Preprocessor) -> None:
        """See `Family`."""
        super().__init__(model, tokenizer, preprocessor)
        config = model.config
        self._placeholders = (config.image_token_id, config.video_token_id)
        marks = (config.vision_start_token_id, config.video_token_id, config.vision_end_token_id)
        self._frame = "".join(tokenizer.convert_ids_to_tokens(list(marks)))
        self._frames_per_patch = preprocessor.geometry.frames_per_patch

    def build_encoder(self, model: Any) -> tuple[Qwen3VLTower, NativeEncoder]:
        """See `Family.build_encoder`."""
        tower = Qwen3VLTower(model.model.visual)
        return tower, NativeEncoder(tower, self.preprocessor, self.decoder.device)

    def check_vision(self, plan: ReductionPlan) -> None:
        """See `Family.check_vision`."""
        check_qwen(plan, self.model_type, self.preprocessor.geometry, num_blocks=self.num_vision_blocks)

    def render(
        self,
        content: Sequence[str | VisualInput],
        num_placeholders: Sequence[int],
        *,
        history: Sequence[Message] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """See `Family.render`. The time of each frame of a video is written before the frame.

        One pair of start and end marks a frame replaces the pair around a video's placeholder, as in transformers 4.57,
        with which the model came; 5.x leaves that pair around all frames.
        """
        media = media_of(content, history)
        images = deque(index for index, mm_item in enumerate(media) if mm_item.kind == "image")
        videos = [index for index, mm_item in enumerate(media) if mm_item.kind == "video"]
        turns = self._chat.template_text(content, history=history, template_args=template_args)
        before, *behind = turns.split(self._frame)
        if len(behind) != len(videos):
            raise ModelLoadError(f"the model's chat template does not write {self._frame!r} once for every video")
        text, frames = before, deque[int]()
        for index, rest in zip(videos, behind, strict=True):
            times_s = frame_times_s(media[index], self._frames_per_patch)
            text += "".join(f"<{time_s:.1f} seconds>{self._frame}" for time_s in times_s) + rest
            frames.extend([index] * len(times_s))
        token_ids: list[int] = []
        starts: dict[int, list[int]] = {index: [] for index in range(len(media))}
        for token_id in self._chat.tokenize(text):
            if token_id not in self._placeholders:
                token_ids.append(token_id)
                continue
            waiting = images if token_id == self._placeholders[0] else frames
            if not waiting:
                raise ModelLoadError("the model's chat template writes more placeholders than there are media")
            index = waiting.popleft()
            count = num_placeholders[index] // self.encoder.grid(media[index]).times
            starts[index].append(len(token_ids))
            token_ids += [token_id] * count
        if images or frames:
            raise ModelLoadError("the model's chat template leaves out some of the media; it is made for text alone")
        spans = tuple((starts[index][0], num_placeholders[index]) for index in range(len(media)))
        return RenderedPrompt(tuple(token_ids), spans, {index: tuple(starts[index]) for index in videos})

    def position_ids(self, prompt: RenderedPrompt, media: Sequence[VisualInput]) -> Tensor:
        """See `Family.position_ids`: three axes; every frame of a video is a grid of its own."""
        grids = []
        for index, ((start, _), mm_item) in enumerate(zip(prompt.spans, media, strict=True)):
            rows, cols = self.encoder.grid(mm_item).groups
            grids += [TokenGrid(begin, 1, rows, cols) for begin in prompt.starts.get(index, (start,))]
        return mrope_positions(len(prompt.token_ids), grids)


def frame_times_s(mm_item: VisualInput, frames_per_patch: int) -> list[float]:
    """Seconds of each temporal patch: halfway between its first and its last frame.

    Source: transformers 5.23, models/qwen3_vl/processing_qwen3_vl.py:_calculate_timestamps.
    """
    times_s = list(mm_item.timestamps_s) or [n / _ASSUMED_FPS for n in range(len(mm_item.tiles))]
    times_s += times_s[-1:] * (-len(times_s) % frames_per_patch)
    return [(times_s[n] + times_s[n + frames_per_patch - 1]) / 2 for n in range(0, len(times_s), frames_per_patch)]

"""Supports InternVL3 and 3.5: a tower with CLS over tiles, a pixel shuffle of 2x2 patches, Qwen2, Qwen3 or Llama.

It borrows the modules of one loaded Hugging Face model; with an empty plan its features equal that model's. Every image
is tiled; each frame of a video is one tile behind "Frame1: ", "Frame2: ", ..., which is text and stays. Reduction works
on whole 2x2 groups, tile by tile; CLS can score them.

Source: transformers 5.23, models/internvl.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import InternVLForConditionalGeneration

from illava.errors import ModelLoadError
from illava.families.base import Family
from illava.families.chat_prompt import RenderedPrompt, media_of
from illava.families.internvl.encoder import TileGroupEncoder
from illava.families.internvl.plan_check import check_internvl
from illava.families.internvl.tower import InternVLTower
from illava.plan import ReductionPlan
from illava.preprocess import Preprocessor, VisualInput
from illava.requests import Message

_TOKENS = ("start_image_token", "end_image_token", "context_image_token", "video_token")


class InternVL(Family):
    """Holds one loaded InternVL model."""

    model_class = InternVLForConditionalGeneration
    image_processor_args: ClassVar[Mapping[str, Any]] = {"crop_to_patches": True}
    tower: InternVLTower
    encoder: TileGroupEncoder

    def __init__(self, model: Any, tokenizer: Any, preprocessor: Preprocessor) -> None:
        """See `Family`.

        Raises:
            ModelLoadError: the tokenizer does not name the tokens around and for a picture.
        """
        missing = [name for name in _TOKENS if getattr(tokenizer, name, None) is None]
        if missing:
            raise ModelLoadError(
                f"the tokenizer of this InternVL names no {', '.join(missing)} in tokenizer_config.json; take the "
                "checkpoint whose name ends in -hf (InternVL3) or -HF (InternVL3.5)"
            )
        super().__init__(model, tokenizer, preprocessor)
        begin, end, context, video = (getattr(tokenizer, name) for name in _TOKENS)
        self._picture, self._context_id = f"{begin}{context}{end}", model.config.image_token_id
        self._placeholder = re.compile(f"(?P<image>{re.escape(context)})|(?P<video>{re.escape(video)})")

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See `Family.check_config`."""
        vision = config.vision_config.model_type
        if vision != "internvl_vision":
            raise ModelLoadError(f"this InternVL has a {vision!r} vision tower; supported is 'internvl_vision'")
        given = (config.vision_feature_layer, config.vision_feature_select_strategy)
        if given != (-1, "default"):
            raise ModelLoadError(
                f"vision_feature_layer {given[0]} with vision_feature_select_strategy {given[1]!r} is not supported; "
                "the published models read the last layer (-1) without its CLS token ('default')"
            )

    def placeholder_ids(self, config: Any, tokenizer: Any) -> dict[str, int]:
        """See `Family.placeholder_ids`; a video has a token of its own, which the model never sees."""
        return {"image": config.image_token_id, "video": tokenizer.convert_tokens_to_ids(tokenizer.video_token)}

    def build_encoder(self, model: Any) -> tuple[InternVLTower, TileGroupEncoder]:
        """See `Family.build_encoder`."""
        tower = InternVLTower(model.model.vision_tower, model.model.multi_modal_projector)
        return tower, TileGroupEncoder(tower, self.preprocessor, self.decoder.device)

    def check_vision(self, plan: ReductionPlan) -> None:
        """See `Family.check_vision`."""
        check_internvl(plan, self.model_type, self.preprocessor.geometry, num_blocks=self.num_vision_blocks)

    def render(
        self,
        content: Sequence[str | VisualInput],
        num_placeholders: Sequence[int],
        *,
        history: Sequence[Message] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """See `Family.render`. Marks stand around every image and frame, and its number before every frame.

        Source: transformers 5.23, models/internvl/processing_internvl.py:replace_image_token, :replace_video_token.
        """
        media = media_of(content, history)
        waiting = {kind: [n for n, m in enumerate(media) if m.kind == kind] for kind in ("image", "video")}
        pictures: list[int] = []  # of each pair of marks, the visual input

        def written(found: re.Match[str]) -> str:
            kind = found.lastgroup or ""
            if not waiting[kind]:
                raise ModelLoadError(f"the model's chat template writes more {kind} placeholders than there are media")
            index = waiting[kind].pop(0)
            num_frames = len(media[index].tiles) if kind == "video" else 1
            pictures.extend([index] * num_frames)
            if kind == "image":
                return self._picture
            return "\n".join(f"Frame{n + 1}: {self._picture}" for n in range(num_frames))

        turns = self._chat.template_text(content, history=history, template_args=template_args)
        text = self._placeholder.sub(written, turns)
        if any(waiting.values()):
            raise ModelLoadError("the model's chat template leaves out some of the media; it is made for text alone")
        token_ids: list[int] = []
        starts: dict[int, list[int]] = {index: [] for index in range(len(media))}
        for token_id in self._chat.tokenize(text):
            if token_id != self._context_id:
                token_ids.append(token_id)
                continue
            index = pictures.pop(0)
            count = num_placeholders[index]
            if media[index].kind == "video":
                count //= len(media[index].tiles)
            starts[index].append(len(token_ids))
            token_ids += [token_id] * count
        spans = tuple((starts[index][0], num_placeholders[index]) for index in range(len(media)))
        frames = {index: tuple(starts[index]) for index, mm_item in enumerate(media) if mm_item.kind == "video"}
        return RenderedPrompt(tuple(token_ids), spans, frames)

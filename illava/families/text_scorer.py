"""Scores how relevant each part of a picture is to a text, by CLIP or CLIPSeg from transformers.

It reads safetensors alone, and runs no code of a model's own. A picture is squeezed to the scorer's square input as a
whole, not cropped, so that every part of it has a relevance.

Shape suffixes: F frames or tiles, P patches of the scorer, D its joint width, R rows, C columns, S side in px.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import CLIPModel, CLIPSegForImageSegmentation

from illava.errors import ModelLoadError
from illava.families.loading import load_weights, read_tokenizer
from illava.host_copies import constant_on, to_device
from illava.model_files import load_model_files
from illava.reducers.base import TextScorer

_CLASSES = {"clip": CLIPModel, "clipseg": CLIPSegForImageSegmentation}
_BATCH = 32  # frames scored at a time


class RelevanceModel:
    """Holds one loaded scorer."""

    def __init__(self, scorer: TextScorer, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load the scorer.

        Raises:
            ModelLoadError: no such model, of another kind, or files that are missing or no safetensors.
        """
        files = load_model_files(scorer.model_id, revision=scorer.revision)
        if files.model_type != scorer.kind:
            raise ModelLoadError(
                f"the text scorer {scorer.model_id!r} is a {files.model_type!r} model; this method needs a "
                f"{scorer.kind!r} model"
            )
        self._kind, self._device, self._dtype = scorer.kind, device, dtype
        self._model: Any = load_weights(
            _CLASSES[scorer.kind], scorer.model_id, revision=scorer.revision, dtype=dtype, device=device
        )
        self._tokenizer = read_tokenizer(scorer.model_id, revision=scorer.revision)
        self._side = self._model.config.vision_config.image_size
        mean, std = (constant_on(files.image_processor[key], device) for key in ("image_mean", "image_std"))
        self._mean_311, self._std_311 = mean.view(3, 1, 1), std.view(3, 1, 1)

    @torch.no_grad()
    def relevance(self, frames_FHW3: Tensor, text: str, rows: int, cols: int) -> Tensor:
        """Score each cell: uint8 [F, H, W, 3] -> float32 [F, rows, cols] in 0 .. 1.

        Frames are scored separately. Text beyond the scorer's positions is cut off. Special tokens in it are text, or
        the end that the text's vector is read at could stand anywhere.
        """
        limit = self._model.config.text_config.max_position_embeddings
        ids = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=limit, split_special_tokens=True)
        score = self._clip if self._kind == "clip" else self._clipseg
        own_ids = {key: to_device(value, self._device) for key, value in ids.items()}
        maps = [score(self._pixels(part), own_ids) for part in frames_FHW3.split(_BATCH)]
        return torch.cat([_to_grid(own_FRC, rows, cols) for own_FRC in maps]).clamp(0, 1)

    def _pixels(self, frames_FHW3: Tensor) -> Tensor:
        pixels_F3HW = to_device(frames_FHW3, self._device).permute(0, 3, 1, 2).float()
        square = interpolate(pixels_F3HW, size=(self._side, self._side), mode="bicubic", antialias=True)
        return ((square.clamp(0, 255) / 255 - self._mean_311) / self._std_311).to(self._dtype)

    def _clip(self, pixels_F3SS: Tensor, ids: dict[str, Tensor]) -> Tensor:
        """(1 + cosine of patch and text) / 2, on CLIP's own grid."""
        model = self._model
        vision = model.vision_model(pixel_values=pixels_F3SS)
        patch_FPD = model.visual_projection(model.vision_model.post_layernorm(vision.last_hidden_state[:, 1:]))
        text_D = model.text_projection(model.text_model(**_known(ids)).pooler_output)[0]
        cosine_FP = normalize(patch_FPD.float(), dim=-1) @ normalize(text_D.float(), dim=-1)
        side = round(cosine_FP.shape[1] ** 0.5)
        return (1 + cosine_FP.view(-1, side, side)) / 2

    def _clipseg(self, pixels_F3SS: Tensor, ids: dict[str, Tensor]) -> Tensor:
        """The logistic of the segmentation's logit, pixel by pixel."""
        repeated = {key: value.expand(len(pixels_F3SS), -1) for key, value in _known(ids).items()}
        logits = self._model(pixel_values=pixels_F3SS, **repeated).logits
        return logits.float().view(len(pixels_F3SS), *logits.shape[-2:]).sigmoid()


def _known(ids: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: ids[key] for key in ("input_ids", "attention_mask")}


def _to_grid(map_FRC: Tensor, rows: int, cols: int) -> Tensor:
    """Interpolate bilinearly; a coarser cell is the average of what it covers."""
    return interpolate(map_FRC[:, None], size=(rows, cols), mode="bilinear", antialias=True)[:, 0]

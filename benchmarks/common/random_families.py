"""Random-weight folders with a published model's true vision tower and decoder depth: for speed, nothing for quality.

The decoder is narrower than published by a whole factor, its depth and the shape of its heads are kept; the vocabulary
is the bytes. Weights repeat one random block: their values do not matter to the time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from illava.model_files import declare_random_weights
from tests.support.models.llava_next import make_llava_next
from tests.support.models.qwen import make_qwen2_vl

# Sources: the config.json of Qwen/Qwen2-VL-2B-Instruct and of llava-hf/llava-v1.6-vicuna-7b-hf.
SIZES: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": {
        "make": make_qwen2_vl,
        "model_class": "Qwen2VLForConditionalGeneration",
        "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14},
        "text": {"hidden_size": 512, "intermediate_size": 2986, "num_hidden_layers": 28, "head_dim": 128}
        | {"num_attention_heads": 4, "num_key_value_heads": 1},
        "mrope_section": [16, 24, 24],
        "text_narrower_by": 3,
    },
    "llava-next-7b": {
        "make": lambda folder: make_llava_next(folder, side=336, patch=14),
        "model_class": "LlavaNextForConditionalGeneration",
        "vision": {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
        "text": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 32, "head_dim": 128}
        | {"num_attention_heads": 4, "num_key_value_heads": 4},
        "text_narrower_by": 8,
    },
}


def make_random_family(folder: Path, size: str) -> None:
    """Write the folder of a named size."""
    shape = SIZES[size]
    shape["make"](folder)
    model_class = getattr(transformers, shape["model_class"])
    config = model_class.config_class.from_pretrained(folder)
    vision = dict(shape["vision"])
    if "mrope_section" in shape:
        vision["hidden_size"] = shape["text"]["hidden_size"]
        config.text_config.layer_types = ["full_attention"] * shape["text"]["num_hidden_layers"]
        config.text_config.rope_parameters["mrope_section"] = shape["mrope_section"]
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            _true_patches(folder / name, vision["patch_size"])
    for section, changes in ((config.vision_config, vision), (config.text_config, shape["text"])):
        for name, value in changes.items():
            setattr(section, name, value)
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        scale = 1.0 if weight.dim() < 2 else weight[0].numel() ** -0.5
        values = block.repeat(-(-weight.numel() // len(block)))[: weight.numel()].view_as(weight)
        weight.data.copy_(values.mul_(scale) if weight.dim() >= 2 else torch.full_like(values, "norm" in name))
    model.save_pretrained(folder)
    declare_random_weights(folder)


def _true_patches(path: Path, patch_px: int) -> None:
    pixels = {"patch_size": patch_px, "min_pixels": 56**2, "max_pixels": 28**2 * 1280}
    path.write_text(json.dumps(json.loads(path.read_text()) | pixels))

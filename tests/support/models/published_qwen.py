"""Builds a published Qwen-VL size on the meta device, and compares its weight names with those of a tiny folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from illava.families import load_family, load_preprocessor
from illava.families.base import Family
from tests.support.models.families import stock_class

# Qwen3-VL's tower as published from 8B on; the smaller ones name what differs.
QWEN3_VISION = {
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def names(keys: Iterable[str]) -> Counter[str]:
    """Names with their numbers left out, and how often each occurs."""
    return Counter(re.sub(r"\.\d+(?=\.)", ".N", key) for key in keys)


def check_published_names(model_type: str, published: dict[str, Any], folder: Path, *, num_layers: int = 3) -> Family:
    """Hold the published configuration's names equal to those that load from a tiny folder of ``num_layers`` layers.

    Returns the family over the published model, without memory.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **published)
    small = load_family(str(folder), dtype=torch.float32, device="cpu")
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", small._tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    for name in ("vision_start", "vision_end"):
        setattr(config, f"{name}_token_id", small._tokenizer.convert_tokens_to_ids(f"<|{name}|>"))
    with torch.device("meta"):
        model = stock_class(model_type)(config).eval()
    family = type(small)(model, small._tokenizer, load_preprocessor(str(folder)))
    text = config.get_text_config()
    assert family.num_vision_blocks == published["vision_config"]["depth"]
    assert family.decoder.num_layers == text.num_hidden_layers
    assert family.decoder.num_kv_heads == text.num_key_value_heads

    loaded = names(stock_class(model_type).from_pretrained(folder).state_dict())
    theirs = names(model.state_dict())
    assert set(theirs) == set(loaded)
    for key, count in theirs.items():
        if ".language_model.layers." in key:
            assert count == text.num_hidden_layers * (loaded[key] // num_layers)
        elif ".visual.blocks." in key:
            assert count == family.num_vision_blocks * (loaded[key] // small.num_vision_blocks)
    return family

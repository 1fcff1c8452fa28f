"""LLaVA-OneVision with random weights made on the device: true shapes without a network or a file of weights."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import AutoTokenizer, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from benchmarks.common.random_onevision import SIZES
from illava import Preprocessor, load_preprocessor
from illava.families.llava.onevision import LlavaOnevision
from tests.support.models.onevision import make_onevision

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {
        **{key: SIZES["so400m-0.5b"][key] for key in ("side", "patch", "vision")},
        "text": {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    },
    "so400m-0.5b": SIZES["so400m-0.5b"],
    "tiny": {**SIZES["tiny"], "text": {**SIZES["tiny"]["text"], "num_key_value_heads": 2}},
}


def build_onevision(
    shape: str, *, device: torch.device, dtype: torch.dtype
) -> tuple[Any, LlavaOnevision, Preprocessor]:
    """The stock model, our family over its modules, and its preprocessor."""
    wanted = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        make_onevision(folder, side=wanted["side"], patch=wanted["patch"])  # tokenizer, processors and configuration
        fields = LlavaOnevisionConfig.from_pretrained(folder).to_dict()
        tokenizer, preprocessor = AutoTokenizer.from_pretrained(folder), load_preprocessor(folder)
    fields["vision_config"] |= wanted["vision"]
    fields["text_config"] = {k: v for k, v in fields["text_config"].items() if k != "layer_types"} | wanted["text"]
    config = LlavaOnevisionConfig.from_dict(fields)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaOnevisionForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, LlavaOnevision(model, tokenizer, preprocessor), preprocessor

"""Tiny random Qwen3.5 folders: as the other Qwen-VL ones, with recurrent layers between those that attend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.models import qwen as models_qwen


def make_qwen3_5(folder: str | Path, *, depth: int = 6, num_layers: int = 4, seed: int = 3, interval: int = 2) -> Path:
    """Write a Qwen3.5 folder: `make_qwen3_vl`'s tower without deepstack; every ``interval``-th layer attends.

    A head's width is 16, of which 8 channels rotate; 2 key heads serve 4 value heads of the recurrent layers.
    """

    tokenizer = models_qwen._tokenizer()
    vision = _vision(depth, patch_px=models_qwen.PATCH_PX, positions=25)
    return _write(folder, tokenizer, vision, _text(tokenizer, num_layers, interval=interval), seed=seed)


def make_narrow_qwen3_5(folder: str | Path) -> Path:
    """Write a folder of the depth, patches and pixel ranges of Qwen3.5-9B, only narrower."""
    tokenizer = models_qwen._tokenizer()
    text = _text(tokenizer, 32, interval=4) | {"max_position_embeddings": 32768}
    folder = _write(folder, tokenizer, _vision(27, patch_px=16, positions=2304), text, seed=0)
    patches = {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    for file, least, most in (
        ("preprocessor_config.json", 65536, 16777216),
        ("video_preprocessor_config.json", 4096, 25165824),
    ):
        size = {"size": {"shortest_edge": least, "longest_edge": most}}
        (folder / file).write_text(json.dumps(patches | size, indent=2))
    return folder


def _vision(depth: int, *, patch_px: int, positions: int) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 64,
        "patch_size": patch_px,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": positions,
    }


def _text(tokenizer: Any, num_layers: int, *, interval: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    kinds = ["linear_attention" if (n + 1) % interval else "full_attention" for n in range(num_layers)]
    return models_qwen._text(tokenizer, num_layers) | {
        "head_dim": 16,
        "rope_parameters": rope,
        "layer_types": kinds,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 16,
    }


def _write(folder: str | Path, tokenizer: Any, vision: dict[str, Any], text: dict[str, Any], *, seed: int) -> Path:
    """Write a model whose states remember some 100 tokens, and whose norms are near the identity."""
    import torch
    from transformers import GenerationConfig, Qwen3_5Config, Qwen3_5ForConditionalGeneration

    config = Qwen3_5Config(text_config=text, vision_config=vision, **models_qwen._tokens(tokenizer))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Qwen3_5ForConditionalGeneration(config).eval()
        models_qwen._scale_weights(model)
        for name, value in model.named_parameters():
            if name.endswith("A_log"):
                value.normal_(-4.5, 0.3)  # a token lets about exp(-4.5) of a state decay
            elif "language_model" in name and name.endswith("norm.weight") and "linear_attn" not in name:
                value.normal_(0.0, 0.1)  # these norms multiply by 1 + weight
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder)
    models_qwen._write_processors(folder, "Qwen3VL")
    return folder

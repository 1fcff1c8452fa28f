"""Model folders as the quantisers write them: config.json and safetensors of their formats, made from a plain folder.

The names, dtypes and settings are those of published checkpoints; the numbers only have to be there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.models.published_llava import edit

Tensors = dict[str, Tensor]


def fp8(name: str, weight: Tensor) -> Tensors:
    """As DeepSeek's and Qwen's own FP8 repositories: one inverse scale a block, here the whole weight."""
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scale.view(1, 1)}


def awq(name: str, weight: Tensor) -> Tensors:
    rows, cols = weight.shape
    return {
        f"{name}.qweight": torch.zeros(cols, rows // 8, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(1, rows, dtype=torch.float16),
    }


def gptq(name: str, weight: Tensor) -> Tensors:
    rows, cols = weight.shape
    return {
        f"{name}.qweight": torch.zeros(cols // 8, rows, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(1, rows, dtype=torch.float16),
        f"{name}.g_idx": torch.zeros(cols, dtype=torch.int32),
    }


def bitsandbytes(name: str, weight: Tensor) -> Tensors:
    return {
        f"{name}.weight": torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.weight.absmax": torch.zeros(weight.numel() // 64, dtype=torch.uint8),
        f"{name}.weight.quant_map": torch.zeros(16),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }


def compressed_tensors(name: str, weight: Tensor) -> Tensors:
    rows, cols = weight.shape
    return {
        f"{name}.weight_packed": torch.zeros(rows, cols // 8, dtype=torch.int32),
        f"{name}.weight_scale": torch.ones(rows, 1, dtype=torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([rows, cols]),
    }


def int8(name: str, weight: Tensor) -> Tensors:
    """No scale beside it, and the weight's own shape: nothing but the dtype tells."""
    return {f"{name}.weight": (weight * 20).round().to(torch.int8)}


def fp8_alone(name: str, weight: Tensor) -> Tensors:
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn)}


# The quantisation_config of published repositories, and how each stores a linear layer of the LLM.
PUBLISHED: dict[str, tuple[Callable[[str, Tensor], Tensors], dict]] = {
    "fp8": (
        fp8,
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "awq": (
        awq,
        {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True},
    ),
    "gptq": (
        gptq,
        {"bits": 4, "damp_percent": 0.1, "desc_act": False, "group_size": 128, "quant_method": "gptq", "sym": True},
    ),
    "bitsandbytes": (
        bitsandbytes,
        {"_load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "load_in_4bit": True, "quant_method": "bitsandbytes"},
    ),
    "compressed-tensors": (
        compressed_tensors,
        {"format": "pack-quantized", "quant_method": "compressed-tensors", "quantization_status": "compressed"},
    ),
}


def make_quantised(plain: Path, folder: Path, method: str) -> Path:
    """A published method's folder."""
    store, declared = PUBLISHED[method]
    store_layers(shutil.copytree(plain, folder), store)
    edit(folder / "config.json", quantization_config=declared)
    return folder


def store_layers(folder: Path, store: Callable[[str, Tensor], Tensors]) -> None:
    """Every linear layer of the LLM's blocks, stored another way; config.json keeps its words."""
    stored: Tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        is_layer = "language_model" in name and "layers." in name and name.endswith("_proj.weight")
        stored |= store(name.removesuffix(".weight"), weight) if is_layer else {name: weight}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def put_json(folder: Path, name: str, content: dict) -> None:
    (folder / name).write_text(json.dumps(content))

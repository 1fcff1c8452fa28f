"""Model folders as the quantisers write them: config.json and safetensors of their formats, made from a plain folder.

The names, dtypes and settings are those of published checkpoints. Those that are read stand for the plain folder's
numbers; of the others they only have to be there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.models.published_llava import edit

Tensors = dict[str, Tensor]
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def fp8(name: str, weight: Tensor) -> Tensors:
    """As DeepSeek's and Qwen's own FP8 repositories: an inverse scale for each block of 16 x 16 (theirs: 128 x 128)."""
    blocks = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
    scale = blocks.abs().amax((1, 3)) / FP8_MAX
    stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).flatten(2, 3).flatten(0, 1)
    return {f"{name}.weight": stored, f"{name}.weight_scale_inv": scale.float()}


def fp8_whole(name: str, weight: Tensor) -> Tensors:
    """One inverse scale for a whole weight."""
    scale = weight.abs().max() / FP8_MAX
    return {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scale.float()}


def compressed(args: QuantizationArgs, form: str) -> Callable[[str, Tensor], Tensors]:
    """As llm-compressor writes a layer, by its own packers; one scale for each output channel, or for a group."""

    def store(name: str, weight: Tensor) -> Tensors:
        groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        scale = groups.abs().amax(-1) / (FP8_MAX if args.type == "float" else 2 ** (args.num_bits - 1) - 1)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        state = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
        packed = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
        return {f"{name}.{key}": value.contiguous() for key, value in packed.items()}

    return store


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


def int8(name: str, weight: Tensor) -> Tensors:
    """No scale beside it, and the weight's own shape: nothing but the dtype tells."""
    return {f"{name}.weight": (weight * 20).round().to(torch.int8)}


def fp8_alone(name: str, weight: Tensor) -> Tensors:
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn)}


def declared(args: QuantizationArgs, form: str, **others: Any) -> dict[str, Any]:
    """The section of config.json that llm-compressor writes."""
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
    if args.num_bits == 8:
        group["input_activations"] = args.model_dump(mode="json") | {"strategy": "token", "dynamic": True}
    ignore = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        **others,
    }


FLOAT8 = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
INT8 = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
INT4 = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=16, symmetric=True)
_NOT_CONVERTED = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "modules_to_not_convert": _NOT_CONVERTED}

# The quantisation_config of published repositories, and how each stores a linear layer of the LLM: those that are read,
Scheme = tuple[Callable[[str, Tensor], Tensors], dict[str, Any]]
READ: dict[str, Scheme] = {
    "fp8": (fp8, _FP8 | {"weight_block_size": [16, 16]}),
    "fp8-tensor": (fp8_whole, _FP8 | {"weight_block_size": None}),
    "compressed-fp8": (compressed(FLOAT8, "float-quantized"), declared(FLOAT8, "float-quantized")),
    "compressed-int8": (compressed(INT8, "int-quantized"), declared(INT8, "int-quantized")),
    "compressed-int4": (compressed(INT4, "pack-quantized"), declared(INT4, "pack-quantized")),
}
# and those that are refused by their names.
PUBLISHED: dict[str, Scheme] = {
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
}


def make_quantised(plain: Path, folder: Path, method: str) -> Path:
    """A published method's folder."""
    store, section = (PUBLISHED | READ)[method]
    store_layers(shutil.copytree(plain, folder), store)
    edit(folder / "config.json", quantization_config=section)
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

"""Refuses checkpoints whose files hold something else than the parameters' own values: quantised weights and adapters.

A number that is cast to a parameter without its scale, or that no parameter takes, gives answers that look right and
are not. Torch-free: the caller reads the files, and hands their content in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from illava.errors import ModelLoadError

# Files beside config.json that say how weights were encoded -> the method where the file does not name it.
_QUANTISATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_ADAPTER_FILE = "adapter_config.json"
SIDE_FILES = (*_QUANTISATION_FILES, _ADAPTER_FILE)

# Of config.json, at any depth -> the method where the section does not name it.
_SECTIONS = {"quantization_config": None, "compression_config": "compressed-tensors", "quantization": "mlx"}
# What the methods store beside, or in place of, a weight.
_QUANTISED_NAME = re.compile(
    r"(^|[._])(weight_scale(_inv|_2)?|(input|activation|act)_scale|qweight|qzeros|scales|g_idx"
    r"|weight_(packed|shape|zero_point|g_idx)|(nested_)?(absmax|quant_map)|quant_state\.\w+|SCB|blocks)$"
)
_ADAPTER_NAME = re.compile(r"[._]lora_|(^|\.)base_model\.model\.")
FLOATING_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_INTEGER_BUFFERS = ("position_ids",)  # indices, in the older CLIP checkpoints
_INSTEAD = (
    "take the unquantised repository (safetensors in bfloat16, float16 or float32); its name is usually this one's "
    "without the method's ending, such as Qwen/Qwen2.5-VL-7B-Instruct for Qwen/Qwen2.5-VL-7B-Instruct-AWQ"
)


def check_encoding(folder: Path, config: Mapping[str, Any], side: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a model whose JSON files say that its weights are quantised, or are an adapter's.

    Args:
        folder: for messages.
        config: config.json; empty where there is none.
        side: content of those of `SIDE_FILES` that are beside it.

    Raises:
        ModelLoadError: names the file, the key and the method, and says what to take instead.
    """
    for where, section, default in _declared(config, side):
        raise ModelLoadError(
            f"{folder / where}: the weights are quantised by {_method(section) or default or 'a method it leaves open'}"
            f", which this package does not compute with; {_INSTEAD}"
        )
    if _ADAPTER_FILE in side:
        base = side[_ADAPTER_FILE].get("base_model_name_or_path") or "its base model"
        raise ModelLoadError(
            f"{folder / _ADAPTER_FILE}: an adapter of {base}, which would be left out; merge it into the base "
            "(peft: PeftModel.merge_and_unload) and give the folder that the merged model's save_pretrained writes. "
            f"Where the weights are merged already, take {_ADAPTER_FILE} away"
        )
    if config.get("transformers_weights") is not None:
        raise ModelLoadError(
            f"{folder / 'config.json'}: transformers_weights names other files than model.safetensors; name the "
            "weights model.safetensors (or model.safetensors.index.json) and take the key away"
        )


def check_stored(model_id: str, dtypes: Mapping[str, str]) -> None:
    """Refuse weight files with tensors that are no parameter's own values, whatever config.json says.

    Args:
        model_id: for messages.
        dtypes: every stored tensor's name -> its dtype as safetensors writes it, such as ``BF16``.

    Raises:
        ModelLoadError: names one of the tensors, and says what to take instead.
    """
    if adapted := [name for name in dtypes if _ADAPTER_NAME.search(name)]:
        raise ModelLoadError(
            f"{len(adapted)} tensors of {model_id!r} are an adapter's, e.g. {min(adapted)!r}; merge it into its base "
            "model (peft: PeftModel.merge_and_unload) and give the merged folder"
        )
    if quantised := [name for name in dtypes if _QUANTISED_NAME.search(name)]:
        raise ModelLoadError(
            f"{len(quantised)} tensors of {model_id!r} belong to quantised weights, e.g. {min(quantised)!r}, which "
            f"this package does not compute with; {_INSTEAD}"
        )
    encoded = [n for n, dtype in dtypes.items() if dtype not in FLOATING_DTYPES and not n.endswith(_INTEGER_BUFFERS)]
    if encoded:
        raise ModelLoadError(
            f"{len(encoded)} tensors of {model_id!r} are no plain floating-point weights, e.g. {min(encoded)!r} in "
            f"{dtypes[min(encoded)]}, whose numbers mean nothing without a scale; {_INSTEAD}"
        )


def check_used(model_id: str, unused: Iterable[str]) -> None:
    """Refuse weight files with tensors that no parameter of the model takes.

    Raises:
        ModelLoadError: names one of the tensors.
    """
    if names := sorted(unused):
        raise ModelLoadError(
            f"{len(names)} tensors of {model_id!r} belong to no weight of the model that its config.json describes, "
            f"e.g. {names[0]!r}, and would be left out; the config.json is another model's, or the files hold more "
            "than the model: download both again from one repository"
        )


def _declared(
    config: Mapping[str, Any], side: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, Any, str | None]]:
    """Every declaration of how the weights are encoded: where it is, what it says, the method to assume."""
    for path, value in _walk(config):
        if path[-1] in _SECTIONS and value is not None:
            yield f"config.json: {'.'.join(path)}", value, _SECTIONS[path[-1]]
    for name, method in _QUANTISATION_FILES.items():
        if name in side:
            yield name, side[name], method


def _walk(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in content.items() if isinstance(content, Mapping) else ():
        yield (*path, key), value
        yield from _walk(value, (*path, key))


def _method(section: Any) -> str | None:
    """The name of the method, as its writer spells it."""
    if not isinstance(section, Mapping):
        return repr(section)
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return "bitsandbytes"
    for key in ("quant_method", "quant_algo"):
        if section.get(key):
            return str(section[key])
    nested = section.get("quantization")  # hf_quant_config.json
    return _method(nested) if isinstance(nested, Mapping) else None

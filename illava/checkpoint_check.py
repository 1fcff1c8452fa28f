"""Says how a checkpoint's weights are stored, and refuses what nothing here can read: unknown encodings, adapters.

A number that is cast to a parameter without its scale, or that no parameter takes, gives answers that look right and
are not. Torch-free: the caller reads the files, and hands their content in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
# What a scheme that is read here stores for one layer.
_PARTS = {
    "fp8": ("weight", "weight_scale_inv", "activation_scale"),
    "compressed-tensors": (
        "weight", "weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale",
    ),
}  # fmt: skip
# Of compressed-tensors: type of the numbers -> formats of the files.
_FORMATS = {
    "float8": ("float-quantized", "naive-quantized"),
    "int8": ("int-quantized", "pack-quantized"),
    "int4": ("pack-quantized",),
}
_ADAPTER_NAME = re.compile(r"[._]lora_|(^|\.)base_model\.model\.")
FLOATING_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_INTEGER_BUFFERS = ("position_ids",)  # indices, in the older CLIP checkpoints
_READABLE = "FP8 as Qwen and DeepSeek publish it, and compressed-tensors of one group in FP8, INT8 or INT4"
_INSTEAD = (
    f"what it reads is {_READABLE}; else take the unquantised repository (safetensors in bfloat16, float16 or "
    "float32); its name is usually this one's without the method's ending, such as Qwen/Qwen2.5-VL-7B-Instruct for "
    "Qwen/Qwen2.5-VL-7B-Instruct-AWQ"
)


@dataclass(frozen=True, slots=True)
class StoredScheme:
    """Says how a checkpoint's quantised weights are stored, where that can be read.

    Attributes:
        method: ``quant_method`` of its config.json.
        weights: type of the numbers.
        has_row_scales: one scale for a tensor or for each output channel, as torch's own product of FP8 wants them.
        quantizes_inputs: the scheme means that a layer's input is quantised too.
    """

    method: Literal["fp8", "compressed-tensors"]
    weights: Literal["float8", "int8", "int4"]
    has_row_scales: bool
    quantizes_inputs: bool

    @property
    def has_common_product(self) -> bool:
        """Whether torch itself multiplies these weights as they are, on cards of compute capability 8.9 and later."""
        by_rows = self.weights == "float8" and self.has_row_scales and self.quantizes_inputs
        return by_rows and self.method == "compressed-tensors"

    @property
    def packages(self) -> tuple[str, ...]:
        """What transformers wants to read it."""
        return ("accelerate",) if self.method == "fp8" else ("accelerate", "compressed_tensors")

    def __str__(self) -> str:
        return f"{self.weights} ({self.method})"


def stored_scheme(where: str, config: Mapping[str, Any]) -> StoredScheme | None:
    """Read ``quantization_config`` of a config.json; None where there is none.

    Raises:
        ModelLoadError: the weights are quantised by something that is not read here; names it.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    found: StoredScheme | str = _method(section) or "a method it leaves open"
    if isinstance(section, Mapping) and found == "fp8":
        found = _fp8(section)
    elif isinstance(section, Mapping) and found == "compressed-tensors":
        found = _compressed_tensors(section)
    if isinstance(found, StoredScheme):
        return found
    raise ModelLoadError(
        f"{where}: quantization_config: the weights are quantised by {found}, which this package does not compute "
        f"with; {_INSTEAD}"
    )


def _fp8(section: Mapping[str, Any]) -> StoredScheme | str:
    """One inverse scale a block of a weight, or one for all of it."""
    blocks, scale_format = section.get("weight_block_size", [128, 128]), section.get("scale_fmt") or "float"
    if section.get("fmt", "e4m3") != "e4m3" or scale_format != "float" or section.get("expert_dtype", "fp8") != "fp8":
        return f"fp8 of another kind (fmt {section.get('fmt')}, scale_fmt {scale_format})"
    return StoredScheme("fp8", "float8", has_row_scales=blocks is None, quantizes_inputs=True)


def _compressed_tensors(section: Mapping[str, Any]) -> StoredScheme | str:
    """One scheme for all quantised layers: transformers dequantises every layer by the first group of several."""
    groups = [group for group in (section.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    form, others = str(section.get("format")), [k for k in ("kv_cache_scheme", "transform_config") if section.get(k)]
    if (section.get("sparsity_config") or {}).get("format", "dense") != "dense":
        others.append("sparsity_config")
    if len(groups) != 1 or others:
        return f"compressed-tensors with {', '.join(others) or f'{len(groups)} config_groups'}"
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    kind = f"{weights.get('type')}{weights.get('num_bits')}"
    form = str(groups[0].get("format") or form)
    if form not in _FORMATS.get(kind, ()) or weights.get("actorder") == "group":
        order = ", actorder group" * (weights.get("actorder") == "group")
        return f"compressed-tensors in {form} ({kind}{order})"
    by_rows = weights.get("strategy") in ("tensor", "channel")
    return StoredScheme("compressed-tensors", kind, has_row_scales=by_rows, quantizes_inputs=bool(inputs))  # type: ignore[arg-type]


def check_encoding(folder: Path, config: Mapping[str, Any], side: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a model whose JSON files say that its weights are stored as nothing here reads, or are an adapter's.

    Args:
        folder: for messages.
        config: config.json; empty where there is none.
        side: content of those of `SIDE_FILES` that are beside it.

    Raises:
        ModelLoadError: names the file, the key and the method, and says what to take instead.
    """
    stored_scheme(str(folder / "config.json"), config)
    for where, section, default in _declared(config, side):
        raise ModelLoadError(
            f"{folder / where}: the weights are quantised by {_method(section) or default or 'a method it leaves open'}"
            f", which this package does not compute with; {_INSTEAD}"
        )
    if _ADAPTER_FILE in side:
        base = side[_ADAPTER_FILE].get("base_model_name_or_path") or "its base model"
        raise ModelLoadError(
            f"{folder / _ADAPTER_FILE}: an adapter of {base}, which would be left out; name the base model in "
            "model.model_id and this folder in model.adapter.id. Where the weights are merged already, take "
            f"{_ADAPTER_FILE} away"
        )
    if config.get("transformers_weights") is not None:
        raise ModelLoadError(
            f"{folder / 'config.json'}: transformers_weights names other files than model.safetensors; name the "
            "weights model.safetensors (or model.safetensors.index.json) and take the key away"
        )


def check_stored(model_id: str, dtypes: Mapping[str, str], scheme: StoredScheme | None = None) -> None:
    """Refuse weight files with tensors that are no parameter's own values, nor what the declared scheme stores.

    Args:
        model_id: for messages.
        dtypes: every stored tensor's name -> its dtype as safetensors writes it, such as ``BF16``.
        scheme: what config.json declares.

    Raises:
        ModelLoadError: names one of the tensors, and says what to take instead.
    """
    if adapted := [name for name in dtypes if _ADAPTER_NAME.search(name)]:
        raise ModelLoadError(
            f"{len(adapted)} tensors of {model_id!r} are an adapter's, e.g. {min(adapted)!r}; name the base model in "
            "model.model_id and this folder in model.adapter.id"
        )
    if scheme is not None:
        dtypes = {name: dtype for name, dtype in dtypes.items() if not _belongs(name, dtypes, scheme)}
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


def is_quantised(name: str) -> bool:
    """Whether a tensor of this name stands beside, or in place of, a quantised weight."""
    return _QUANTISED_NAME.search(name) is not None


def _belongs(name: str, dtypes: Mapping[str, str], scheme: StoredScheme) -> bool:
    """Whether a tensor is one that the scheme stores for a layer, of which a scale is there."""
    layer, _, part = name.rpartition(".")
    scale = "weight_scale_inv" if scheme.method == "fp8" else "weight_scale"
    return f"{layer}.{scale}" in dtypes and part in _PARTS[scheme.method]


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
        if path[-1] in _SECTIONS and value is not None and path != ("quantization_config",):
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

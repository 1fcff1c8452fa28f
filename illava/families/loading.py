"""Loads weights, tokenizer and chat template from a Hugging Face folder or hub id, or says why it cannot.

It reads safetensors only, and never runs code that comes with a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from illava.checkpoint_check import FLOATING_DTYPES, StoredScheme, check_stored, check_used
from illava.errors import ModelLoadError
from illava.families.adapters import Adapter, inject_adapter, is_adapted, merge_layer
from illava.families.quantization import OnLoad, holds_encoded, stored_options
from illava.weight_files import Quantization

_PROCESSOR_TEMPLATE = "chat_template.json"
_UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_config(model_class: Any, model_id: str, *, revision: str | None) -> Any:
    """Load the configuration as transformers reads it, with defaults for keys that config.json leaves out.

    Raises:
        ModelLoadError: config.json does not fit the class.
    """
    try:
        return model_class.config_class.from_pretrained(model_id, revision=revision or "main")
    except _UNREADABLE as error:
        raise _refusal(model_class, model_id, revision, error) from error


def load_weights(
    model_class: Any,
    model_id: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device | str,
    scheme: StoredScheme | None = None,
    quantization: Quantization = "none",
    adapter: Adapter | None = None,
) -> Any:
    """Load the model in eval mode, without a second copy of the weights in host memory.

    The files are mapped, not read: a weight's memory pages come in when the weight is converted and moved, and a
    shard's pages go when its last weight has moved. So the host holds about one shard beside the weights that stay
    there as ``dtype``; weights that have this dtype already stay mapped. Files of mixed dtypes are converted while they
    are all still mapped. A layer is adapted, merged and quantised as soon as it stands on its device, and before the
    next one comes: the device never holds all of them in two forms. A checkpoint that is quantised already is read
    straight to the device.

    Raises:
        ModelLoadError: weights are missing, incomplete, corrupt, of another model, not safetensors, or quantised
            otherwise than ``scheme`` says; or adapter and quantisation do not fit the model or each other.
    """
    model = _read_weights(model_class, model_id, revision, dtype=dtype, device=device, scheme=scheme)
    if adapter is not None:
        inject_adapter(model, adapter, model_id)
    on_load = None if quantization == "none" else OnLoad(quantization, dtype=dtype, device=device)
    if adapter is not None or on_load is not None:
        _finish_layers(model, adapter, on_load, dtype=dtype, device=device)
    for weight in _castable(model):
        weight.data = weight.data.to(device).to(dtype)
    return model.to(device).eval()


def _read_weights(
    model_class: Any,
    model_id: str,
    revision: str | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    scheme: StoredScheme | None,
) -> Any:
    """The model as transformers gives it, all of whose weights were found."""
    try:
        stored = _stored_dtypes(model_id, revision)
        check_stored(model_id, stored, scheme)
        options: dict[str, Any] = {"dtype": _one_dtype(stored) or dtype}
        if scheme is not None:
            config = load_config(model_class, model_id, revision=revision)
            options = {"dtype": dtype, **stored_options(config, scheme, device)}
        model, report = model_class.from_pretrained(
            model_id,
            revision=revision,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, with an own message
            output_loading_info=True,
            **options,
        )
    except ModelLoadError:
        raise
    except _UNREADABLE as error:
        raise _refusal(model_class, model_id, revision, error) from error
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    for what, names in (("missing", set(report["missing_keys"]) - mismatched), ("of another shape", mismatched)):
        if names:  # transformers would go on with random numbers there
            raise ModelLoadError(
                f"{len(names)} weights of {model_id!r} are {what}, e.g. {min(names)!r}: the folder is incomplete or "
                "its config.json is another model's; download it again"
            )
    check_used(model_id, report["unexpected_keys"])
    return model


def _finish_layers(
    model: Any, adapter: Adapter | None, on_load: OnLoad | None, *, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Move, merge and quantise layer by layer, in the order of the mapped files."""
    layers = [(name, m) for name, m in model.named_modules() if is_adapted(m) or isinstance(m, nn.Linear)]
    inner = {id(part) for _, m in layers if is_adapted(m) for part in m.modules() if part is not m}
    layers = [(name, layer) for name, layer in layers if id(layer) not in inner]
    for name, layer in sorted(layers, key=lambda pair: getattr(pair[1], "base_layer", pair[1]).weight.data_ptr()):
        layer.to(device).to(dtype)
        if adapter is not None and adapter.merge and is_adapted(layer):
            layer = merge_layer(model, name, layer)  # noqa: PLW2901
        if on_load is not None:
            on_load.quantize(name, getattr(layer, "base_layer", layer))


def _castable(model: Any) -> list[Tensor]:
    """All weights that mean what they say, in the order of the mapped files, so that each is let go before the next.

    Buffers keep their dtype, and so does every number that has a scale.
    """
    modules = (module for module in model.modules() if not holds_encoded(module))
    found = {id(p): p for module in modules for p in module.parameters(recurse=False)}
    return sorted(found.values(), key=Tensor.data_ptr)


def _refusal(model_class: Any, model_id: str, revision: str | None, error: Exception) -> ModelLoadError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelLoadError(
        f"cannot load {model_id!r} (revision {revision or 'main'}) as {model_class.__name__} from safetensors: {reason}"
    )


def _stored_dtypes(model_id: str, revision: str | None) -> dict[str, str]:
    """The dtype of every tensor of the files, as safetensors writes it."""

    def find(name: str) -> str | None:
        return cached_file(model_id, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    paths = [find(SAFE_WEIGHTS_NAME)]  # which transformers prefers to shards, too
    if paths == [None] and (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        paths = [find(name) for name in shards]
    stored: dict[str, str] = {}
    for path in filter(None, paths):
        with safe_open(path, framework="pt") as shard:
            stored |= {key: shard.get_slice(key).get_dtype() for key in shard.keys()}  # noqa: SIM118
    if not stored:
        raise OSError(f"no tensors in {SAFE_WEIGHTS_NAME}, and none in the shards of {SAFE_WEIGHTS_INDEX_NAME}")
    return stored


def _one_dtype(stored: Mapping[str, str]) -> torch.dtype | None:
    """The common dtype of all floating weights in the files, whatever config.json says; None if there are several."""
    found = set(stored.values()) & FLOATING_DTYPES
    return _FLOATS[found.pop()] if len(found) == 1 else None


def load_tokenizer(model_id: str, *, revision: str | None) -> Any:
    """Load the tokenizer, with the chat template that the model's processor would use.

    Raises:
        ModelLoadError: no tokenizer, or no chat template.

    Source of the precedence (chat_template.json of the processor over the tokenizer's own): transformers 5.23,
    processing_utils.py:get_processor_dict.
    """
    tokenizer = read_tokenizer(model_id, revision=revision)
    path = cached_file(model_id, _PROCESSOR_TEMPLATE, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is not None:
        tokenizer.chat_template = _processor_template(Path(path))
    if tokenizer.chat_template is None:
        raise ModelLoadError(
            f"{model_id!r} has no chat template: neither {_PROCESSOR_TEMPLATE}, chat_template.jinja nor one in "
            "tokenizer_config.json; add one to the model folder"
        )
    return tokenizer


def read_tokenizer(model_id: str, *, revision: str | None) -> Any:
    """The tokenizer as its files have it.

    Raises:
        ModelLoadError: there is none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=False)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # damaged files lead transformers and tokenizers into errors of any class
        reason = f"{type(error).__name__}: {error}"
        raise ModelLoadError(f"{model_id!r} has no tokenizer that can be loaded: {reason}") from error


def _processor_template(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    except (ValueError, LookupError, TypeError) as error:
        raise ModelLoadError(
            f"{path} is not a JSON object with a key `chat_template` ({type(error).__name__}: {error}); compare it "
            "with the published one"
        ) from error


def stop_token_ids(model: Any) -> frozenset[int]:
    """Tokens that end an answer: from generation_config.json, else from the text model's configuration.

    Raises:
        ModelLoadError: neither file names one.
    """
    for config in (model.generation_config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    raise ModelLoadError("neither generation_config.json nor config.json names an eos_token_id; answers would not end")

"""Adds a LoRA adapter to a model that is being loaded, merged into its weights or beside them. Torch-free to import.

Its tensors come from safetensors alone, and every one of them must find its place: an adapter that is applied in part
gives answers that look right and are not.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from illava.errors import ModelLoadError
from illava.families.extras import require_packages
from illava.model_files import is_hub_snapshot, model_folder

if TYPE_CHECKING:
    from torch import nn

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's own
_NOT_BUILT = ("modules_to_save", "trainable_token_indices", "megatron_config")
_ENDING = re.compile(r"(-unsloth)?(-bnb-4bit|-fp8(-dynamic)?|-awq|-gptq\S*|-int[48])$")


@dataclass(frozen=True, slots=True)
class Adapter:
    """Names a LoRA adapter.

    Attributes:
        id: folder, or hub id.
        revision: of the hub.
        merge: into the weights, so that it costs nothing while the model runs; else it is computed beside them.
    """

    id: str
    revision: str | None = None
    merge: bool = True


def check_adapter(adapter: Adapter, model_id: str) -> Path:
    """Read an adapter's settings, and refuse one that cannot be added to this model; returns its folder.

    Raises:
        ModelLoadError: no such adapter, another kind than LoRA, no safetensors, or trained on another model.
    """
    folder = model_folder(adapter.id, adapter.revision)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelLoadError(f"{folder} has no {CONFIG_FILE}: model.adapter.id names a folder or repository of peft")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind, base = str(settings["peft_type"]), str(settings.get("base_model_name_or_path") or "")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{path} is not what peft writes ({type(error).__name__}: {error})") from error
    if kind.upper() != "LORA":
        raise ModelLoadError(f"{path}: an adapter of the kind {kind}; only LORA is built")
    if trained := [key for key in _NOT_BUILT if settings.get(key)]:
        raise ModelLoadError(
            f"{path}: {trained[0]} {settings[trained[0]]!r} replaces whole modules, which is not built; merge it into "
            "its base model (peft: PeftModel.merge_and_unload) and give the merged folder as model.model_id"
        )
    if not (folder / WEIGHTS_FILE).is_file() and not is_hub_snapshot(folder):
        raise ModelLoadError(f"{folder} has no {WEIGHTS_FILE}; other formats may run code and are not read")
    if _is_another(base, model_id):
        raise ModelLoadError(
            f"{path}: trained on {base}, and model.model_id is {model_id}: on another model its numbers mean nothing. "
            f"Take {base} as the model; or, where the two are one model under two names, write the second there as "
            "base_model_name_or_path"
        )
    return folder


def _is_another(base: str, model_id: str) -> bool:
    """Whether both are names of the hub, and of different models; a quantised copy's name counts as its original's."""
    folder = Path(model_id)
    cached = re.search(r"models--[^/]+?--([^/]+)", str(folder.resolve())) if folder.is_dir() else None
    here = cached[1] if cached else "" if folder.is_dir() else folder.name
    is_name = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not base.startswith(".")
    return is_name and bool(here) and _plain_name(base.rpartition("/")[2]) != _plain_name(here)


def _plain_name(name: str) -> str:
    return _ENDING.sub("", name.lower())


def inject_adapter(model: Any, adapter: Adapter, model_id: str) -> None:
    """Put an adapter's layers in place of those that it adapts; nothing is merged yet.

    Raises:
        ModelLoadError: peft is missing, as `check_adapter`, or tensors and layers do not fit each other.
    """
    require_packages("adapters", "peft", purpose="model.adapter")
    folder = check_adapter(adapter, model_id)
    if not (folder / WEIGHTS_FILE).is_file():
        folder = _fetch_weights(adapter)
    try:
        report = model.load_adapter(str(folder), adapter_name=_NAME, use_safetensors=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelLoadError(f"adapter {adapter.id!r} cannot be added to {model_id!r}: {reason}") from error
    mismatched = {entry[0] for entry in report.mismatched_keys}
    for what, names in (
        ("belong to no layer of the model", report.unexpected_keys),
        ("are of another shape than its layers", mismatched),
        ("are missing", report.missing_keys),
    ):
        if names:
            raise ModelLoadError(
                f"adapter {adapter.id!r} is not one of {model_id!r}: {len(names)} of its tensors {what}, e.g. "
                f"{min(map(str, names))!r}; take the base model that its {CONFIG_FILE} names"
            )

    beside = [] if adapter.merge else [m.get_base_layer() for m in model.modules() if is_adapted(m)]
    if others := sorted({type(layer).__name__ for layer in beside if "Linear" not in type(layer).__name__}):
        raise ModelLoadError(
            f"adapter {adapter.id!r} adapts layers of the kind {', '.join(others)}, which is not built beside the "
            "weights: set model.adapter.merge to true"
        )


def _fetch_weights(adapter: Adapter) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(adapter.id, WEIGHTS_FILE, revision=adapter.revision)).parent
    except EntryNotFoundError as error:
        raise ModelLoadError(
            f"{adapter.id!r} has no {WEIGHTS_FILE}; other formats may run code and are not read"
        ) from error


def is_adapted(layer: Any) -> bool:
    """Whether a layer is a base layer with an adapter's tensors beside it."""
    return hasattr(layer, "base_layer")


def merge_layer(model: nn.Module, name: str, layer: Any) -> Any:
    """Merge one layer's adapter into its weight, and put that back in place; returns the plain layer.

    Raises:
        ModelLoadError: the merged weight would not be finite.
    """
    try:
        layer.merge(safe_merge=True)  # into a copy: the files stay as they are
    except ValueError as error:
        raise ModelLoadError(f"the adapter of {name} cannot be merged: {error}") from error
    model.set_submodule(name, plain := layer.get_base_layer())
    return plain

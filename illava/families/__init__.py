"""The registry of model families: Hugging Face's ``model_type`` -> family class, imported on first use.

A new family is one file here and one line in `FAMILIES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from illava.errors import ModelLoadError

if TYPE_CHECKING:
    import torch

    from illava.families.base import Family

FAMILIES = {
    "llava_next": "illava.families.llava.next:LlavaNext",
    "llava_onevision": "illava.families.llava.onevision:LlavaOnevision",
    "qwen2_5_vl": "illava.families.qwen.qwen2_5_vl:Qwen25VL",
    "qwen2_vl": "illava.families.qwen.qwen2_vl:Qwen2VL",
    "qwen3_vl": "illava.families.qwen.qwen3_vl:Qwen3VL",
}


def load_family(
    model_id: str, *, revision: str | None = None, dtype: torch.dtype, device: torch.device | str
) -> Family:
    """Load a model's weights and tokenizer from a local folder or the hub.

    Only safetensors are read, and no code that comes with a model is run.

    Args:
        model_id: local folder, or hub id.
        revision: hub commit.
        dtype: of all weights.
        device: where they go.

    Raises:
        ModelLoadError: unknown family, no such model, weights that are missing, incomplete or not safetensors.
    """
    from illava.model_files import load_model_files

    files = load_model_files(model_id, revision=revision)
    model_type = files.model_type
    if model_type not in FAMILIES:
        raise ModelLoadError(
            f"{model_id!r} is a {model_type!r} model; families that can be loaded: {', '.join(sorted(FAMILIES))}"
        )
    module, name = FAMILIES[model_type].split(":")
    family: Family = getattr(import_module(module), name).load(model_id, revision=revision, dtype=dtype, device=device)
    family.has_random_weights = files.has_random_weights
    return family

"""Registers the model families by ``model_type`` of Hugging Face, and loads models and preprocessors.

A new family is one `FamilySpec` here. Torch-free: every part is named as ``module:name`` and imported on first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from illava.errors import ModelLoadError
from illava.model_files import ModelFiles, load_model_files
from illava.pixel_limits import NO_LIMITS, PixelLimits
from illava.preprocess import Preprocessor
from illava.weight_files import Quantization, check_options

if TYPE_CHECKING:
    import torch

    from illava.families.adapters import Adapter
    from illava.families.base import Family


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """Names the parts of one model family.

    Attributes:
        model_type: as in config.json.
        family: the `Family` subclass.
        geometry: torch-free function, from `ModelFiles` to the family's arithmetic of sizes and counts.
        depth: torch-free function, from `ModelFiles` to (vision blocks that are run, decoder layers).
        preprocessor: torch-free function, from `ModelFiles` and that geometry to a `Preprocessor`.
        plan_check: torch-free function that refuses a plan which the tower cannot carry out.
        presets: names of the plans that the shipped configurations of its published checkpoints take.
        pixel_limits: fields of `PixelLimits` that mean something for it.
        hybrid: torch-free function, from `ModelFiles` to the decoder's `HybridLayers`; empty where all layers attend.
    """

    model_type: str
    family: str
    geometry: str
    depth: str
    preprocessor: str
    plan_check: str
    presets: tuple[str, ...]
    pixel_limits: tuple[str, ...]
    hybrid: str = ""


_NATIVE = ("max_pixels", "min_pixels", "total_pixels")
_SPECS = (
    FamilySpec(
        model_type="internvl",
        family="illava.families.internvl.internvl:InternVL",
        geometry="illava.families.internvl.geometry:internvl_geometry",
        depth="illava.families.internvl.geometry:model_depth",
        preprocessor="illava.families.internvl.preprocessor:internvl_preprocessor",
        plan_check="illava.families.internvl.plan_check:check_internvl",
        presets=("ward-image-25",),
        pixel_limits=("max_tiles",),
    ),
    FamilySpec(
        model_type="llava_next",
        family="illava.families.llava.next:LlavaNext",
        geometry="illava.families.llava.geometry:next_geometry",
        depth="illava.families.llava.geometry:model_depth",
        preprocessor="illava.families.llava.preprocessor:next_preprocessor",
        plan_check="illava.families.llava.plan_check:check_next",
        presets=("ward-image-50",),
        pixel_limits=("max_tiles",),
    ),
    FamilySpec(
        model_type="llava_onevision",
        family="illava.families.llava.onevision:LlavaOnevision",
        geometry="illava.families.llava.geometry:onevision_geometry",
        depth="illava.families.llava.geometry:model_depth",
        preprocessor="illava.families.llava.preprocessor:onevision_preprocessor",
        plan_check="illava.families.llava.plan_check:check_onevision",
        presets=("ward-image-50", "ward-video-25"),
        pixel_limits=("max_tiles",),
    ),
    FamilySpec(
        model_type="qwen2_5_vl",
        family="illava.families.qwen.qwen2_5_vl:Qwen25VL",
        geometry="illava.families.qwen.geometry:qwen2_geometry",
        depth="illava.families.qwen.geometry:model_depth",
        preprocessor="illava.families.qwen.preprocessor:qwen2_preprocessor",
        plan_check="illava.families.qwen.plan_check:check_windowed",
        presets=("ward-qwen2.5-vl-25",),
        pixel_limits=_NATIVE,
    ),
    FamilySpec(
        model_type="qwen2_vl",
        family="illava.families.qwen.qwen2_vl:Qwen2VL",
        geometry="illava.families.qwen.geometry:qwen2_geometry",
        depth="illava.families.qwen.geometry:model_depth",
        preprocessor="illava.families.qwen.preprocessor:qwen2_preprocessor",
        plan_check="illava.families.qwen.plan_check:check_qwen",
        presets=("ward-qwen2-vl-25",),
        pixel_limits=_NATIVE,
    ),
    FamilySpec(
        model_type="qwen3_vl",
        family="illava.families.qwen.qwen3_vl:Qwen3VL",
        geometry="illava.families.qwen.geometry:qwen3_geometry",
        depth="illava.families.qwen.geometry:model_depth",
        preprocessor="illava.families.qwen.preprocessor:qwen3_preprocessor",
        plan_check="illava.families.qwen.plan_check:check_qwen",
        presets=("ward-qwen2-vl-25",),
        pixel_limits=_NATIVE,
    ),
    FamilySpec(
        model_type="qwen3_vl_moe",
        family="illava.families.qwen.qwen3_vl_moe:Qwen3VLMoe",
        geometry="illava.families.qwen.geometry:qwen3_geometry",
        depth="illava.families.qwen.geometry:model_depth",
        preprocessor="illava.families.qwen.preprocessor:qwen3_preprocessor",
        plan_check="illava.families.qwen.plan_check:check_qwen",
        presets=("ward-qwen2-vl-25",),
        pixel_limits=_NATIVE,
    ),
    FamilySpec(
        model_type="qwen3_5",
        family="illava.families.qwen.qwen3_5:Qwen35",
        geometry="illava.families.qwen.geometry:qwen3_geometry",
        depth="illava.families.qwen.geometry:model_depth",
        preprocessor="illava.families.qwen.preprocessor:qwen3_preprocessor",
        plan_check="illava.families.qwen.plan_check:check_qwen",
        presets=("ward-qwen2-vl-25",),
        pixel_limits=_NATIVE,
        hybrid="illava.families.qwen.hybrid_layers:read_hybrid_layers",
    ),
)
FAMILIES = {spec.model_type: spec for spec in _SPECS}


def load_part(name: str) -> Any:
    """Import a part of a `FamilySpec`."""
    module, attribute = name.split(":")
    return getattr(import_module(module), attribute)


def load_spec(model_id: str, *, revision: str | None = None) -> tuple[FamilySpec, ModelFiles]:
    """Find the family of a model folder or hub id, and read the model's JSON files.

    Raises:
        ModelLoadError: the model is of no supported family, or as `load_model_files`.
    """
    files = load_model_files(model_id, revision=revision)
    if "model_type" not in files.config.content:
        raise ModelLoadError(
            f"{model_id!r}: {files.config.where} names no model_type, so its family is not known: it is no checkpoint "
            f"in the form of transformers. Supported are: {', '.join(FAMILIES)}; take a checkpoint of one of these, "
            "often the one whose name ends in -hf"
        )
    if files.model_type not in tuple(FAMILIES):  # config.json may hold anything
        raise ModelLoadError(
            f"{model_id!r} is a {files.model_type!r} model, which is not supported (model_type in "
            f"{files.config.where}). Supported are: {', '.join(FAMILIES)}; take a checkpoint of one of these"
        )
    return FAMILIES[files.model_type], files


def require_supported(model_id: str, *, revision: str | None = None) -> None:
    """Refuse, by its JSON files, a model that cannot be run, before anything is made for it.

    Raises:
        ModelLoadError: an unsupported family, quantised weights, an adapter, or no readable config.json.
    """
    load_spec(model_id, revision=revision)


def unused_limits(spec: FamilySpec, limits: PixelLimits) -> str | None:
    """Say which limits mean nothing for a family, and which it takes; None where all mean something."""
    unknown = [name for name in limits.named if name not in spec.pixel_limits]
    if not unknown:
        return None
    reads = "tiles of one size" if spec.pixel_limits != _NATIVE else "pictures of any size"
    have = "has" if len(unknown) == 1 else "have"
    return (
        f"{', '.join(unknown)} {have} no meaning for a {spec.model_type} model, which reads {reads}; set "
        f"{', '.join(spec.pixel_limits)} instead"
    )


def load_geometry(spec: FamilySpec, files: ModelFiles, limits: PixelLimits) -> Any:
    """Read a model's geometry from its files, within these limits.

    Raises:
        ModelLoadError: a file or key is missing, or the limits make no sense for this model.
    """
    if problem := unused_limits(spec, limits):
        raise ModelLoadError(problem)
    geometry = load_part(spec.geometry)(files)
    return geometry.within(limits) if limits.named else geometry


def load_preprocessor(
    model_id: str, *, revision: str | None = None, pixel_limits: PixelLimits = NO_LIMITS
) -> Preprocessor:
    """Make the preprocessor of a model folder or hub id, from its JSON files alone (no weights, no torch).

    Args:
        model_id: local folder, or hub id.
        revision: hub commit; None for a local folder.
        pixel_limits: bounds of the pictures' sizes; the model is loaded with the same ones.

    Raises:
        ModelLoadError: a file or key is missing, the family is unknown, or the files ask for an unsupported step; or
            the limits make no sense for this model.
    """
    spec, files = load_spec(model_id, revision=revision)
    preprocessor: Preprocessor = load_part(spec.preprocessor)(files, load_geometry(spec, files, pixel_limits))
    return preprocessor


def load_family(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype,
    device: torch.device | str,
    pixel_limits: PixelLimits = NO_LIMITS,
    quantization: Quantization = "none",
    adapter: Adapter | None = None,
) -> Family:
    """Load a model's weights and tokenizer from a local folder or the hub.

    Only safetensors are read, and no code that comes with a model is run.

    Args:
        model_id: local folder, or hub id.
        revision: hub commit.
        dtype: of all weights that are not quantised.
        device: where they go.
        pixel_limits: bounds of the pictures' sizes, as the preprocessor has them.
        quantization: of the decoder's linear layers, made while loading.
        adapter: added to the model.

    Raises:
        ModelLoadError: unknown family, no such model, weights that are missing, incomplete or not safetensors; or an
            adapter or a quantisation that does not fit the model.
    """
    spec, files = load_spec(model_id, revision=revision)
    check_options(
        model_id,
        files.config.content,
        scheme=files.stored_scheme,
        quantization=quantization,
        has_adapter=adapter is not None,
    )
    family_class: type[Family] = load_part(spec.family)
    preprocessor = load_preprocessor(model_id, revision=revision, pixel_limits=pixel_limits)
    family = family_class.load(
        model_id,
        preprocessor,
        revision=revision,
        dtype=dtype,
        device=device,
        scheme=files.stored_scheme,
        quantization=quantization,
        adapter=adapter,
    )
    family.has_random_weights = files.has_random_weights
    return family

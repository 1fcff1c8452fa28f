"""Depth and geometry of a model from its config.json, before any weight is loaded: what counting tokens needs.

Torch-free. The LLaVA and Qwen families. Knows no plan and no media.
"""

from __future__ import annotations

from dataclasses import dataclass

from illava.errors import ModelLoadError
from illava.families.llava.geometry import AnyresGeometry, load_geometry
from illava.families.qwen.geometry import NativeGeometry
from illava.families.qwen.preprocessor import NATIVE_MODEL_TYPES, load_native_geometry
from illava.model_files import JsonSection, load_model_files

# Source: transformers 5.23, LlamaConfig and MistralConfig.
_DEFAULT_NUM_LAYERS = {"llama": 32, "mistral": 32}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Depth and geometry of one model.

    Attributes:
        geometry: tiles and grids.
        num_vision_blocks: blocks of the tower up to the feature that is used.
        num_decoder_layers: of the LLM.
    """

    geometry: AnyresGeometry | NativeGeometry
    num_vision_blocks: int
    num_decoder_layers: int


def load_model_shape(model_id: str, *, revision: str | None = None) -> ModelShape:
    """Depth and geometry from config.json alone.

    Raises:
        ModelLoadError: a file or key is missing, or the model is of no family that is counted.
    """
    files = load_model_files(model_id, revision=revision)
    if files.model_type in NATIVE_MODEL_TYPES:
        text = files.config.section("text_config") if files.config.get("text_config") else files.config
        depth = files.config.section("vision_config")["depth"]
        return ModelShape(load_native_geometry(files), depth, text["num_hidden_layers"])
    if files.model_type not in ("llava_next", "llava_onevision"):
        raise ModelLoadError(
            f"{model_id!r} is a {files.model_type!r} model; tokens are counted for llava_next, llava_onevision, "
            f"{', '.join(sorted(NATIVE_MODEL_TYPES))}"
        )
    feature = files.config["vision_feature_layer"]
    num_blocks = files.config.section("vision_config")["num_hidden_layers"]
    if not isinstance(feature, int):
        raise ModelLoadError(f"{files.config.where}: vision_feature_layer is {feature!r}; expected one layer")
    return ModelShape(
        geometry=load_geometry(files),
        num_vision_blocks=num_blocks + 1 + feature if feature < 0 else feature,
        num_decoder_layers=_num_decoder_layers(files.config.section("text_config")),
    )


def _num_decoder_layers(text: JsonSection) -> int:
    """Layers of the LLM; published LLaVA-NeXT 7B configurations leave out what is their class's default."""
    default = _DEFAULT_NUM_LAYERS.get(text.get("model_type"))
    return text["num_hidden_layers"] if default is None else text.get("num_hidden_layers", default)

"""Reads a model's depth and geometry from its JSON files, before any weight is loaded, to count tokens and check plans.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from illava.families import FamilySpec, load_geometry, load_part, load_spec
from illava.families.hybrid_layers import HybridLayers
from illava.families.internvl.geometry import TileGroupGeometry
from illava.families.llava.geometry import AnyresGeometry
from illava.families.qwen.geometry import NativeGeometry
from illava.model_files import ModelFiles
from illava.pixel_limits import NO_LIMITS, PixelLimits
from illava.plan import ReductionPlan
from illava.reduction.evidence import check_decoder_steps


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Holds the depth and geometry of one model.

    Attributes:
        geometry: tiles and grids.
        num_vision_blocks: blocks of the tower up to the feature that is used.
        num_decoder_layers: of the LLM.
        hybrid: which of these attend, and what the others keep.
    """

    geometry: AnyresGeometry | NativeGeometry | TileGroupGeometry
    num_vision_blocks: int
    num_decoder_layers: int
    hybrid: HybridLayers


def load_model_shape(
    model_id: str, *, revision: str | None = None, pixel_limits: PixelLimits = NO_LIMITS
) -> ModelShape:
    """Read depth and geometry from the JSON files alone.

    Raises:
        ModelLoadError: a file or key is missing, or the model is of no supported family.
    """
    spec, files = load_spec(model_id, revision=revision)
    geometry = load_geometry(spec, files, pixel_limits)
    num_blocks, num_layers = load_part(spec.depth)(files)
    return ModelShape(geometry, num_blocks, num_layers, load_hybrid_layers(spec, files))


def load_hybrid_layers(spec: FamilySpec, files: ModelFiles) -> HybridLayers:
    """Read from its JSON files which layers of a model's decoder attend.

    Raises:
        ModelLoadError: a key is missing, or a layer is of an unknown kind.
    """
    if spec.hybrid:
        hybrid: HybridLayers = load_part(spec.hybrid)(files)
        return hybrid
    return HybridLayers(tuple(range(load_part(spec.depth)(files)[1])))


def check_plan(plan: ReductionPlan, model_id: str, *, revision: str | None = None) -> None:
    """Refuse a plan that makes no sense for a model, as its `Family.check` would, from the JSON files alone.

    Raises:
        PlanError: says what is wrong, where, and what would be right.
        ModelLoadError: as `load_model_shape`.
    """
    spec, files = load_spec(model_id, revision=revision)
    num_blocks, num_layers = load_part(spec.depth)(files)
    load_part(spec.plan_check)(
        plan,
        spec.model_type,
        load_part(spec.geometry)(files),
        num_blocks=num_blocks,
        full_blocks=files.config.section("vision_config").get("fullatt_block_indexes"),
    )
    check_decoder_steps(plan, num_layers, load_hybrid_layers(spec, files).attention_layers)

"""Registers the reducers: a plan's `reducer:` key names one of them by its `kind`.

A new method is one file here and one word in the union; or a class of another package, see `out_of_tree`.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, get_args

from pydantic import Field, SerializeAsAny, ValidatorFunctionWrapHandler, WrapValidator

from illava.reducers.attention_pruning import AttentionPruning
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Scope, Stage
from illava.reducers.bounded_error import BoundedError
from illava.reducers.clip_crop import ClipCrop
from illava.reducers.clipseg_crop import ClipSegCrop
from illava.reducers.divprune import DivPrune
from illava.reducers.evs import EVS
from illava.reducers.fastv import FastV
from illava.reducers.fewer_frames import FewerFrames
from illava.reducers.flashvid import FlashVID
from illava.reducers.frame_merging import FrameMerging
from illava.reducers.free_videollm import FreeVideoLLM
from illava.reducers.greedy import Greedy
from illava.reducers.illava import ILLaVA
from illava.reducers.illava_2026 import ILLaVA2026
from illava.reducers.kmeans import KMeans
from illava.reducers.lower_resolution import LowerResolution
from illava.reducers.out_of_tree import load_reducer, out_of_tree_kinds
from illava.reducers.pixel_dedup import PixelDedup
from illava.reducers.pixel_prune import PixelPrune
from illava.reducers.pooling import Pooling
from illava.reducers.prumerge import PruMerge
from illava.reducers.pyramiddrop import PyramidDrop
from illava.reducers.random import Random
from illava.reducers.scope import SCOPE
from illava.reducers.tome import ToMe
from illava.reducers.uniform_stride import UniformStride
from illava.reducers.vidcom2 import VidCom2
from illava.reducers.visionzip import VisionZip
from illava.reducers.ward import Ward

_Union = (
    ILLaVA
    | ILLaVA2026
    | AttentionPruning
    | FastV
    | Random
    | UniformStride
    | Pooling
    | ToMe
    | Greedy
    | KMeans
    | PruMerge
    | VisionZip
    | DivPrune
    | SCOPE
    | VidCom2
    | EVS
    | FlashVID
    | FewerFrames
    | LowerResolution
    | PixelPrune
    | PixelDedup
    | ClipCrop
    | ClipSegCrop
    | FreeVideoLLM
    | BoundedError
    | PyramidDrop
    | FrameMerging
    | Ward
)
REDUCERS: dict[str, type[Reducer]] = {cls.model_fields["kind"].default: cls for cls in get_args(_Union)}


def _of_any_package(data: object, own: ValidatorFunctionWrapHandler) -> Reducer:
    """Validate by the class that has the kind; an unknown kind is told here, before pydantic tells of tags."""
    if isinstance(data, Reducer) and data.kind not in REDUCERS:
        return data
    if isinstance(data, dict) and data.get("kind") not in REDUCERS:
        given, others = data.get("kind"), out_of_tree_kinds()
        if isinstance(given, str) and given in others:
            return load_reducer(others[given]).model_validate(data)
        known = [*REDUCERS, *others]
        near = get_close_matches(str(given), known, n=1)
        wrong = "a reducer needs a `kind`" if given is None else f"no reducer of kind {given!r}"
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"{wrong}{hint} the kinds are: {', '.join(known)}")
    found: Reducer = own(data)
    return found


AnyReducer = Annotated[SerializeAsAny[_Union], Field(discriminator="kind"), WrapValidator(_of_any_package)]

__all__ = [
    "EVS",
    "REDUCERS",
    "SCOPE",
    "AnyReducer",
    "AttentionPruning",
    "BoundedError",
    "ClipCrop",
    "ClipSegCrop",
    "DivPrune",
    "Evidence",
    "EvidenceKind",
    "FastV",
    "FewerFrames",
    "FlashVID",
    "FrameMerging",
    "FreeVideoLLM",
    "Greedy",
    "ILLaVA",
    "ILLaVA2026",
    "KMeans",
    "LowerResolution",
    "PixelDedup",
    "PixelPrune",
    "Pooling",
    "PruMerge",
    "PyramidDrop",
    "Random",
    "Reducer",
    "Scope",
    "Stage",
    "ToMe",
    "UniformStride",
    "VidCom2",
    "VisionZip",
    "Ward",
]

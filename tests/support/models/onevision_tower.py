"""Media and plans for the tiny LLaVA-OneVision's vision tests, and kept tokens read off the trace alone."""

from __future__ import annotations

import numpy as np
import torch

from illava.plan import ReductionPlan
from illava.preprocess import VisualInput
from illava.visual_tokens import EncodedVisual

GRID = 7
# (height, width): square, wide, tall, very wide (unpadded to less than a tile), exactly the largest canvas
SIZES = [(100, 100), (60, 150), (150, 60), (40, 300), (168, 168)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[0:height, 0:width]
    smooth = np.stack([row * 255 / height, col * 255 / width, 127 + 100 * np.sin((row + 2 * col) / 9)], axis=-1)
    return np.clip(smooth + rng.normal(0, 30, smooth.shape), 0, 255).astype(np.uint8)


def clip(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.stack([picture(60, 90, seed * 100 + n) for n in range(num_frames)])


def plan(layout: str = "geometric", *, num_merged: int = 6, budget: dict | None = None) -> ReductionPlan:
    """49 patches, four cuts of 6 leave 25 = 5 x 5."""
    steps = [{"stage": "vision_block", "layers": [2, 3, 4, 5], "reducer": {"kind": "illava", "num_merged": num_merged}}]
    if budget is not None:
        steps.append({"stage": "decoder_input", "reducer": {"kind": "illava", **budget}})
    return ReductionPlan(layout=layout, steps=steps)


def encode_one(family, mm_item: VisualInput, plan: ReductionPlan, *, trace: bool = False) -> EncodedVisual:
    (encoded,) = family.encode([mm_item], plan, trace=trace)
    _check_contract(encoded)
    return encoded


def _check_contract(encoded: EncodedVisual) -> None:
    num_kept = encoded.feature_KD.shape[0]
    assert encoded.placeholder_K.shape == (num_kept,)
    assert encoded.coord_K3.shape == (num_kept, 3)
    assert torch.equal(encoded.placeholder_K, encoded.placeholder_K.unique())
    assert int(encoded.placeholder_K[-1]) < encoded.num_placeholders
    assert sum(count for _, count in encoded.frame_counts) == num_kept


def tower_kept_tokens(family, mm_item: VisualInput, plan: ReductionPlan) -> tuple[torch.Tensor, list[list], dict]:
    """Oracle: projected kept tokens, the place of each by tile, and the kept token that every cell went into.

    Reads the trace's tower matrices only: a cell belongs to the row that its weight ends up in.
    """
    encoded = encode_one(family, mm_item, plan, trace=True)
    matrix = torch.eye(encoded.num_patches)
    for step in encoded.trace[:-1]:
        matrix = step.matrix.to_dense() @ matrix
    assert encoded.trace[-1].stage == "layout"
    place = encoded.trace[-2].coords[:, 1:].tolist()
    owner = {}
    for cell, (_, tile, row, col) in enumerate(encoded.patch_coord_P4.tolist()):
        (rows,) = matrix[:, cell].nonzero(as_tuple=True)
        assert len(rows) == 1
        owner[tile, row, col] = int(rows[0])
    return matrix, place, owner


def projected(family, mm_item: VisualInput, plan: ReductionPlan) -> torch.Tensor:
    """Kept tokens at LLM width in packed order, before any layout."""
    seen = []
    hook = family.encoder._projector.register_forward_hook(lambda module, args, out: seen.append(out))
    family.encode([mm_item], plan, trace=False)
    hook.remove()
    return seen[0]

"""Says after every step of a trace which token each patch belongs to, or that it is gone.

A patch belongs to the one token that it has the largest weight in (the first of equals), so cells partition the patch
grid exactly, also where a method or bilinear pooling spreads a patch over several tokens. Plain lists and numpy,
without pixels and colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from illava.requests import TokenTrace

GONE = -1

# What a step is called in a picture.
_NAMES = {
    "media": "before the tower",
    "vision_block": "tower, block",
    "vision_output": "behind the tower",
    "unmerge": "grid restored",
    "layout": "projector and layout",
    "decoder_input": "into the language model",
    "decoder_layer": "language model, before layer",
}


@dataclass(frozen=True, slots=True)
class PatchCells:
    """Partitions a request's patches.

    Attributes:
        title: of the step it stands behind.
        representative_P: int64, the token each patch belongs to; `GONE` where no token holds any of it.
        num_tokens: visual tokens behind the step, separators included.
        num_separators: tokens made of no patch (newlines).
    """

    title: str
    representative_P: np.ndarray
    num_tokens: int
    num_separators: int

    @property
    def num_shared(self) -> int:
        """Tokens whose every patch weighs more elsewhere: they live on patches that are drawn in another's colour."""
        drawn = np.unique(self.representative_P[self.representative_P != GONE]).size
        return self.num_tokens - self.num_separators - drawn


def cells_of(trace: TokenTrace) -> list[PatchCells]:
    """Return the partition as the patches enter the tower, and behind each step of the trace."""
    num_patches = trace.patch_coords.shape[0]
    found = [PatchCells("input", np.arange(num_patches), num_patches, 0)]
    for upto, step in enumerate(trace.steps, 1):
        matrix = trace.matrix(upto)
        name = _NAMES.get(step.stage, step.stage)
        title = name if step.layer is None else f"{name} {step.layer}"
        num_tokens = matrix.shape[0]
        filled = np.unique(matrix.indices()[0].numpy()).size
        found.append(PatchCells(title, representatives(matrix), num_tokens, num_tokens - filled))
    return found


def representatives(matrix_KP: Tensor) -> np.ndarray:
    """Return the token in which each patch has its largest weight: int64 [P] of a sparse [K, P] matrix."""
    matrix_KP = matrix_KP.coalesce()
    token_E, patch_E = (index.numpy() for index in matrix_KP.indices())
    weight_E = np.abs(matrix_KP.values().numpy())
    representative_P = np.full(matrix_KP.shape[1], GONE, dtype=np.int64)
    held = weight_E > 0
    token_E, patch_E, weight_E = token_E[held], patch_E[held], weight_E[held]
    order = np.lexsort((token_E, -weight_E, patch_E))  # by patch; the heaviest first, then the first token
    patches, first = np.unique(patch_E[order], return_index=True)
    representative_P[patches] = token_E[order][first]
    return representative_P

"""Patches among packed tokens of which a CLS token leads every segment. Knows nothing of attention or reduction.

Shape suffixes: T tokens packed end to end, P patches among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava.tokens import offsets


def patch_index(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where the patches lie, CLS being the first token of every segment: int64 [P]."""
    is_patch_T = torch.ones(sum(lengths), dtype=torch.bool)
    is_patch_T[offsets(lengths, is_patch_T.device)] = False
    return is_patch_T.nonzero().squeeze(1).to(device, non_blocking=True)


def only_patches(patch_P: Tensor | None, value_T: Tensor) -> Tensor:
    """The patches' share: [T, ...] -> [P, ...]; None where patches are all there is."""
    return value_T if patch_P is None else value_T.index_select(0, patch_P)


def among_all(patch_P: Tensor | None, value_P: Tensor, num_tokens: int) -> Tensor:
    """What belongs to patches, 0 for CLS: [P] -> [T]."""
    return value_P if patch_P is None else value_P.new_zeros(num_tokens).index_copy_(0, patch_P, value_P)

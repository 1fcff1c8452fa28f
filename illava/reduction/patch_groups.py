"""Shows a tower's patches to a reducer as its tokens, and spreads the reducer's decision over the patches again.

A CLS token that leads every segment is left out. Towers whose merger joins square groups of patches into one vision
token are reduced by whole groups. A group's hidden state and keys are those of its patches side by side, its score is
their mean, its coordinates are its own row and column. So a merged group is, corner by corner, the weighted mean of the
groups it is made of.

Shape suffixes: T patches, those of a group side by side (with a CLS token: all packed tokens, P patches among them); G
groups, m patches of a group, D channels, H heads, d head width, E edges, K kept.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from illava.host_copies import device_cache, to_device
from illava.reducers.base import Evidence
from illava.tokens import Assignment, Tokens


@device_cache(64)
def patch_index(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices of the patches among packed tokens, CLS being the first token of every segment: int64 [P]."""
    with torch.inference_mode(False):  # cached, and training may use what inference made
        parts = [torch.arange(stop - n + 1, stop) for n, stop in zip(lengths, accumulate(lengths), strict=True)]
        return to_device(torch.cat([torch.empty(0, dtype=torch.long), *parts]), device)


def only_patches(patch_P: Tensor | None, value_T: Tensor) -> Tensor:
    """Select the patches' values: [T, ...] -> [P, ...]. ``patch_P`` None: all tokens are patches."""
    return value_T if patch_P is None else value_T.index_select(0, patch_P)


def among_all(patch_P: Tensor | None, value_P: Tensor, num_tokens: int) -> Tensor:
    """Spread the patches' values over all tokens, 0 for CLS: [P] -> [T]."""
    return value_P if patch_P is None else value_P.new_zeros(num_tokens).index_copy_(0, patch_P, value_P)


def group_tokens(tokens: Tokens, side: int) -> Tokens:
    """Make one token of each group of ``side`` x ``side`` patches."""
    if side == 1:
        return tokens
    size = side**2
    coord_G3 = tokens.coord_T3[::size].clone()
    coord_G3[:, 1:] //= side
    hidden_GX = tokens.hidden_TD.reshape(-1, size * tokens.hidden_TD.shape[1])
    return Tokens(hidden_GX, tuple(n // size for n in tokens.lengths), coord_G3)


def group_evidence(evidence: Evidence, side: int) -> Evidence:
    """Evidence of patches as evidence of their groups: mean scores and sizes, keys side by side; seeds stay."""
    if side == 1:
        return evidence
    keys_THd = evidence.keys_THd
    if keys_THd is not None:
        keys_THd = keys_THd.unflatten(0, (-1, side**2)).transpose(1, 2).flatten(2)
    return Evidence(
        attention_received_T=group_scores(evidence.attention_received_T, side),
        keys_THd=keys_THd,
        cls_attention_T=group_scores(evidence.cls_attention_T, side),
        size_T=group_scores(evidence.size_T, side),
        seeds=evidence.seeds,
    )


def group_scores(score_T: Tensor | None, side: int) -> Tensor | None:
    """Mean score of each group: [T] -> [G]."""
    return None if score_T is None else score_T.view(-1, side**2).mean(1)


def spread(assignment: Assignment, side: int) -> Assignment:
    """Turn an assignment of groups into one of patches: every corner is kept and mixed as its group is."""
    if side == 1:
        return assignment
    size, device = side**2, assignment.kept_K.device
    corner_m = torch.arange(size, device=device)

    def corners(index_G: Tensor) -> Tensor:
        return (index_G[:, None] * size + corner_m).flatten()

    num_edges, num_rows = assignment.source_E.shape[0], assignment.target_G.shape[0]
    row_E = torch.arange(num_rows, device=device).repeat_interleave(assignment.size_G, output_size=num_edges)
    order = torch.argsort(corners(row_E), stable=True)  # the edges of a group's first corner, of its second, ...
    return Assignment(
        num_tokens=assignment.num_tokens * size,
        lengths=tuple(n * size for n in assignment.lengths),
        kept_K=corners(assignment.kept_K),
        source_E=corners(assignment.source_E)[order],
        weight_E=assignment.weight_E.repeat_interleave(size)[order],
        target_G=corners(assignment.target_G),
        size_G=assignment.size_G.repeat_interleave(size),
        group_size=assignment.group_size,
    )

"""Computes similarities, nearest tokens and group means for reducers.

Shape suffixes: S segments, N tokens of the longest segment, A queries, B candidates, D channels, T tokens packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava.host_copies import constant_on

_BLOCK_ROWS = 256
_RESOLUTION = 2**16


def unit(value_TD: Tensor) -> Tensor:
    """Rows of length one, float32; a zero row stays zero."""
    return torch.nn.functional.normalize(value_TD.float(), dim=-1)


def unit_keys(keys_THd: Tensor) -> Tensor:
    """Keys averaged over heads, of length one: [T, H, d] -> [T, d] float32."""
    return unit(keys_THd.float().mean(1))


def without_rounding(cosine: Tensor) -> Tensor:
    """Round cosines to steps of 2^-16, in place, so that equal values tie whatever last bits the kernels gave them.

    Tokens that look the same, as on a blank page, have cosines of 1 but for those bits. A tie has a defined order;
    rounding errors have none.
    """
    return cosine.mul_(_RESOLUTION).round_().div_(_RESOLUTION)


def inside(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Mask of the cells of a padded table that hold a token: bool [S, width]."""
    return torch.arange(width, device=device) < constant_on(lengths, device)[:, None]


def nearest(query_SAD: Tensor, key_SBD: Tensor, bias_SB: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate of largest ``query . key + bias`` for every query: values and indices, [S, A] each; see
    `without_rounding`.

    A block of queries at a time, so that no A x B map is ever whole in memory. Impossible candidates have bias -inf.
    """
    key_SDB, bias_S1B = key_SBD.transpose(1, 2), bias_SB[:, None]
    best = [
        without_rounding(torch.baddbmm(bias_S1B.expand(-1, block_SaD.shape[1], -1), block_SaD, key_SDB)).max(-1)
        for block_SaD in query_SAD.split(_BLOCK_ROWS, dim=1)
    ]
    return torch.cat([b.values for b in best], 1), torch.cat([b.indices for b in best], 1)


def nearest_member(label_T: Tensor, closeness_T: Tensor) -> Tensor:
    """The member of each token's group that is closest to the group's centre: int64 [T], ties to the earlier token.

    Args:
        label_T: int64, any numbers; equal ones form a group.
        closeness_T: float, higher = closer.
    """
    order_T = torch.argsort(closeness_T, descending=True, stable=True)
    order_T = order_T[torch.argsort(label_T[order_T], stable=True)]  # by label, the closest member first
    sorted_T = label_T[order_T]
    first_T = torch.ones_like(sorted_T, dtype=torch.bool)
    first_T[1:] = sorted_T[1:] != sorted_T[:-1]
    start_T = torch.where(first_T, torch.arange(label_T.shape[0], device=label_T.device), 0).cummax(0).values
    return torch.empty_like(order_T).index_copy_(0, order_T, order_T[start_T])


def group_mean(value_TD: Tensor, weight_T: Tensor, label_T: Tensor, num_groups: int) -> Tensor:
    """Weighted mean of each group, float32 [num_groups, D], zero for an empty one. Sums run in token order, always."""
    return group_mean_and_weight(value_TD, weight_T, label_T, num_groups)[0]


def group_mean_and_weight(
    value_TD: Tensor, weight_T: Tensor, label_T: Tensor, num_groups: int
) -> tuple[Tensor, Tensor]:
    """The same, and the weight of each group: float32 [num_groups]."""
    order_T = torch.argsort(label_T, stable=True)
    count_G = torch.zeros(num_groups, dtype=torch.long, device=label_T.device)
    count_G.index_add_(0, label_T, torch.ones_like(label_T))
    weight_T = weight_T.float()[order_T]
    total_G = torch.segment_reduce(weight_T[:, None], "sum", lengths=count_G, axis=0, unsafe=True).squeeze(1)
    sum_GD = torch.nn.functional.embedding_bag(  # gathers, weighs and sums in one pass
        order_T, value_TD.float(), count_G.cumsum(0) - count_G, mode="sum", per_sample_weights=weight_T
    )
    return sum_GD / total_G.clamp(min=torch.finfo(torch.float32).tiny)[:, None], total_G


def nearest_other(unit_SND: Tensor, inside_SN: Tensor) -> Tensor:
    """Cosine of each token's most similar other token of its segment, [S, N]; -inf where there is none.

    A block of rows at a time, so that no N x N map is ever whole in memory.
    """
    unit_SDN, outside_S1N = unit_SND.transpose(1, 2), ~inside_SN[:, None]
    best = []
    for start in range(0, unit_SND.shape[1], _BLOCK_ROWS):
        similarity_SaN = torch.bmm(unit_SND[:, start : start + _BLOCK_ROWS], unit_SDN).masked_fill_(
            outside_S1N, float("-inf")
        )
        similarity_SaN.diagonal(offset=start, dim1=1, dim2=2).fill_(float("-inf"))
        best.append(similarity_SaN.amax(-1))
    return torch.cat(best, 1) if best else unit_SND.new_empty(inside_SN.shape)

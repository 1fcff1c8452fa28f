"""Makes the assignment of a partition whose groups are numbered: means, and the members that represent them.

Shape suffixes: S segments, N tokens of the longest segment, T tokens packed, G groups of all segments, E edges (one a
token), D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava.tokens import Assignment, offsets, ragged_index

_RESOLUTION = 2**16
_NUM_PLACES = 2**32  # more than there are tokens
_CPU_ROWS = 1024  # whose distances are computed at once: more is fresh memory, zeroed page by page


def merge_groups(
    point_TD: Tensor, weight_T: Tensor, group_SN: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]
) -> Assignment:
    """Each group becomes its weighted mean, at the coordinates of the member that is nearest to the points' mean.

    Of members that are equally near it is the earliest; distances are compared in steps of 2^-16, so that both of a
    pair are, whatever the last bit. Sums run in token order. Counts stay host integers.

    Args:
        point_TD: float32, where the tokens lie.
        weight_T: float32, positive.
        group_SN: int64 groups, counted within their segment from 0; anything behind a segment's end.
        lengths: tokens per segment.
        kept: groups per segment; none is empty.
    """
    num_groups, device = sum(kept), point_TD.device
    place_G = ragged_index((num_groups,), num_groups, device)
    group_T = _packed(group_SN + offsets(kept, device)[:, None], lengths)
    order_T = torch.argsort(group_T, stable=True)
    bound_X = torch.searchsorted(group_T[order_T], ragged_index((num_groups + 1,), num_groups + 1, device))
    begin_G, size_G = bound_X[:-1], bound_X[1:] - bound_X[:-1]
    ordered_weight_T = weight_T[order_T]
    total_G = torch.segment_reduce(ordered_weight_T, "sum", lengths=size_G, axis=0, unsafe=True)
    sum_GD = torch.nn.functional.embedding_bag(  # gathers, weighs and sums in one pass
        order_T, point_TD, begin_G, mode="sum", per_sample_weights=ordered_weight_T
    )
    member_G = _nearest_members(point_TD, sum_GD.div_(total_G[:, None]), group_T)
    kept_K, rank_K = member_G.sort()
    row_T = torch.empty_like(rank_K).index_copy_(0, rank_K, place_G)[group_T]
    source_E = torch.argsort(row_T, stable=True)
    weight_E = weight_T[source_E] / total_G[group_T[source_E]]
    return Assignment(sum(lengths), kept, kept_K, source_E, weight_E, place_G, size_G[rank_K], keeps_content=True)


def _nearest_members(point_TD: Tensor, mean_GD: Tensor, group_T: Tensor) -> Tensor:
    """The token of each group that is nearest to its mean: int64 [G]. The minimum of integers has no order of sums."""
    rows = len(point_TD) if point_TD.is_cuda else _CPU_ROWS
    parts = zip(point_TD.split(rows), group_T.split(rows), strict=True)
    distances = [(x_RD - mean_GD[group_R]).square_().sum(1) for x_RD, group_R in parts]
    distance_T = distances[0] if len(distances) == 1 else torch.cat(distances)
    steps_T = distance_T.mul_(_RESOLUTION).round_().long()
    key_T = steps_T.mul_(_NUM_PLACES).add_(ragged_index((len(group_T),), len(group_T), group_T.device))
    nearest_G = key_T.new_full((len(mean_GD),), torch.iinfo(torch.long).max)
    return nearest_G.scatter_reduce_(0, group_T, key_T, "amin").remainder_(_NUM_PLACES)


def _packed(value_SN: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The first ``lengths[s]`` cells of each row, end to end; a view where all are equal."""
    if all(n == value_SN.shape[1] for n in lengths):
        return value_SN.flatten()
    return value_SN.flatten().index_select(0, ragged_index(lengths, value_SN.shape[1], value_SN.device))

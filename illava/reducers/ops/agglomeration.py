"""Merges points by agglomeration: in rounds, each point or group of points joins the one that it costs least to join.

The cost of joining a and b is w_a w_b / (w_a + w_b) |x_a - x_b|^2, with w their weights and x their weighted means:
what it adds to the squared error of replacing every point by the mean of its group (Ward's criterion).

Shape suffixes: S segments, N points of the longest segment, K those after a round, R points of a block of rows, Q joins
of the segment with most of them, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from illava.attention.backend import kernels_on
from illava.host_copies import constant_on
from illava.reducers.ops.round_groups import Groups
from illava.reducers.ops.similarity import inside

# At most this share of the points joins in a round, and there are some rounds at least. One join a round is the
# thorough way, in as many rounds as points go; a sixteenth stays within a few per cent of its error.
_ROUND_RATIO, _LEAST_ROUNDS = 1 / 16, 3
_BLOCK_ROWS = 1024
_CPU_PRODUCTS = 2**21  # of segments together, 8 MiB: more is fresh memory in every round, zeroed page by page


@dataclass(frozen=True, slots=True)
class _ByChannels:
    """Holds the points of long segments; their products are made in every round, a block of rows at a time."""

    point_SND: Tensor

    def products(self, rows: slice) -> Tensor:
        """Products of a block of points with all points: [S, R, N]."""
        return torch.bmm(self.point_SND[:, rows], self.point_SND.transpose(1, 2))

    def squares(self) -> Tensor:
        """Product of each point with itself: [S, N]."""
        return self.point_SND.square().sum(-1)

    def products_with(self, other_SN: Tensor) -> Tensor:
        """Product of each point with one other: [S, N]."""
        other_SND = self.point_SND.gather(1, other_SN[..., None].expand_as(self.point_SND))
        return (self.point_SND * other_SND).sum(-1)

    def joined(self, number_SN: Tensor, weight_SN: Tensor, width: int) -> tuple[_ByChannels, Tensor]:
        """The means of groups, and their weights [S, K]."""
        groups = Groups.of(number_SN, weight_SN, width)
        return _ByChannels(groups.means(self.point_SND)), groups.weight_SK


@dataclass(frozen=True, slots=True)
class _ByProducts:
    """Holds all products of the points of short segments; those of means are means of products."""

    product_SNN: Tensor

    def products(self, rows: slice) -> Tensor:
        return self.product_SNN[:, rows]

    def squares(self) -> Tensor:
        return self.product_SNN.diagonal(dim1=1, dim2=2)

    def products_with(self, other_SN: Tensor) -> Tensor:
        return self.product_SNN.gather(2, other_SN[..., None]).squeeze(2)

    def joined(self, number_SN: Tensor, weight_SN: Tensor, width: int) -> tuple[_ByProducts, Tensor]:
        groups = Groups.of(number_SN, weight_SN, width)
        mean_SKN = groups.means(self.product_SNN)
        return _ByProducts(groups.means(mean_SKN.transpose(1, 2))), groups.weight_SK


_Points = _ByChannels | _ByProducts


def agglomerate(point_SND: Tensor, weight_SN: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """Join each segment's points until ``kept[s]`` groups are left: the group of each point, int64 [S, N].

    A segment has rounds of its own, whatever stands beside it; their counts are host integers, so that nothing waits
    for the device. Groups are counted within their segment.

    Args:
        point_SND: float32.
        weight_SN: float32, positive.
        lengths: points per segment.
        kept: groups to be left per segment, ``1 <= kept[s] <= lengths[s]`` (0 only for an empty segment).
    """
    together = _num_together(point_SND)
    if together < len(lengths):
        parts = zip(point_SND.split(together), weight_SN.split(together), strict=True)
        spans = [slice(start, start + together) for start in range(0, len(lengths), together)]
        return torch.cat([agglomerate(*part, lengths[own], kept[own]) for part, own in zip(parts, spans, strict=True)])
    width, rounds = point_SND.shape[1], _rounds(lengths, kept)
    points: _Points = _ByChannels(point_SND)
    if width <= _BLOCK_ROWS:
        product_SNN = points.products(slice(None))
        if rounds and kernels_on(point_SND.device) == "triton":
            from illava.reducers.ops.triton_agglomeration import join_in_rounds

            counts = [own for segment in zip(lengths, *(after for _, after in rounds), strict=True) for own in segment]
            count_SX = constant_on(counts, point_SND.device, torch.int32).view(len(lengths), -1)
            return join_in_rounds(product_SNN, weight_SN, count_SX)
        points = _ByProducts(product_SNN)
    group_SN = torch.arange(width, device=point_SND.device).repeat(len(lengths), 1)
    for before, after in rounds:
        into_SN = _Ranked.of(points, weight_SN, before).joins(_differences(before, after))
        number_SN = _numbers(into_SN, before, max(after))
        points, weight_SN = points.joined(number_SN, weight_SN, max(after))
        group_SN = number_SN.clamp(max=max(after) - 1).gather(1, group_SN)
    return group_SN


def _num_together(point_SND: Tensor) -> int:
    """How many segments have their rounds at once: all, but on CPU as many as stay in memory that is warm."""
    num_segments, width = point_SND.shape[:2]
    return num_segments if point_SND.is_cuda else max(1, _CPU_PRODUCTS // max(1, width**2))


def agglomerate_within(
    point_SND: Tensor, weight_SN: Tensor, lengths: tuple[int, ...], allowed_S: Tensor, at_most: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Join each segment's points as long as its error stays within bounds: the group of each point, groups per segment.

    The error is the squared distance of every point to the mean of its group, weighted and summed. A round makes as
    many of the cheapest joins as the error has room for, at most its share of the groups. The host reads counts twice a
    round, since the data decide. A segment that has more groups than ``at_most`` left is joined on until it has not.

    Args:
        point_SND, weight_SN, lengths: see `agglomerate`.
        allowed_S: float32, the error allowed in each segment.
        at_most: groups that may be left of each, whatever the error.
    """
    width = point_SND.shape[1]
    points: _Points = _ByChannels(point_SND)
    if width <= _BLOCK_ROWS:
        points = _ByProducts(points.products(slice(None)))
    group_SN = torch.arange(width, device=point_SND.device).repeat(len(lengths), 1)
    whole_S, error_S = _kept_squares(points, weight_SN, lengths), torch.zeros_like(allowed_S)
    before, widest = lengths, tuple(max(1, int(n * _ROUND_RATIO)) if n > 1 else 0 for n in lengths)
    while any(widest):
        ranked = _Ranked.of(points, weight_SN, before)
        told = ranked.affordable(allowed_S - error_S, max(widest)).tolist()
        num_joins = tuple(min(*pair) for pair in zip(told, widest, strict=True))
        after = tuple(n - joins for n, joins in zip(before, num_joins, strict=True))
        number_SN = _numbers(ranked.joins(num_joins), before, max(after))
        joined, joined_weight_SN = points.joined(number_SN, weight_SN, max(after))
        joined_error_S = whole_S - _kept_squares(joined, joined_weight_SN, after)
        fits = (joined_error_S <= allowed_S).tolist()
        if not all(fits):  # a long chain costs more than its joins one by one
            widest = tuple(n if fit else n // 2 for n, fit in zip(num_joins, fits, strict=True))
            continue
        points, weight_SN, error_S, before = joined, joined_weight_SN, joined_error_S, after
        group_SN = number_SN.clamp(max=max(after) - 1).gather(1, group_SN)
        widest = tuple(
            max(1, int(n * _ROUND_RATIO)) if joins and n > 1 else 0 for n, joins in zip(after, num_joins, strict=True)
        )
    kept = tuple(map(min, before, at_most))
    if kept == before:
        return group_SN, kept
    for n, k in _rounds(before, kept):
        number_SN = _numbers(_Ranked.of(points, weight_SN, n).joins(_differences(n, k)), n, max(k))
        points, weight_SN = points.joined(number_SN, weight_SN, max(k))
        group_SN = number_SN.clamp(max=max(k) - 1).gather(1, group_SN)
    return group_SN, kept


def _kept_squares(points: _Points, weight_SN: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Weighted squares of each segment's points: what they lose by a join is its error. Float32 [S]."""
    square_SN = points.squares() * weight_SN
    return square_SN.masked_fill(~inside(lengths, square_SN.shape[1], square_SN.device), 0.0).double().sum(1).float()


def _differences(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n - k for n, k in zip(before, after, strict=True))


def _rounds(lengths: tuple[int, ...], kept: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Points per segment before and after each round: by equal factors, as few as are allowed."""
    schedules = []
    for n, k in zip(lengths, kept, strict=True):
        rounds = max(_LEAST_ROUNDS, math.ceil(math.log(n / k) / -math.log(1 - _ROUND_RATIO))) if k < n else 0
        counts = [round(n * (k / n) ** (r / rounds)) for r in range(rounds)] + [k]
        schedules.append(list(dict.fromkeys(counts)))  # of few points a factor may take none
    longest = max(map(len, schedules), default=1)
    left = zip(*(own + own[-1:] * (longest - len(own)) for own in schedules), strict=True)
    return list(pairwise(left))


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Ranks the joins of one round.

    A point may join its nearest, by `_nearest`. If that one would rather join a third, the cost is that of joining both
    of them. The joins that cost least are taken. A point joins one whose own nearest is nearer, or of two that are each
    other's nearest the later joins the earlier, so that no joins go round in a circle. Where ties or rounding leave too
    few such joins, points join the one whose nearest is nearest of all.

    Attributes:
        order_SN: int64, the points by the cost of their joins.
        target_SN: int64, what each one would join.
        cost_SN: float32, at what cost; not finite where it may not.
    """

    order_SN: Tensor
    target_SN: Tensor
    cost_SN: Tensor

    @classmethod
    def of(cls, points: _Points, weight_SN: Tensor, lengths: tuple[int, ...]) -> _Ranked:
        inside_SN = inside(lengths, weight_SN.shape[1], weight_SN.device)
        square_SN = points.squares().masked_fill(~inside_SN, float("inf"))
        cost_SN, near_SN = _nearest(points, square_SN, weight_SN)
        may_SN, both_SN = _prices(points, square_SN, weight_SN, cost_SN, near_SN)
        first_S1 = cost_SN.argmin(1, keepdim=True)
        rank_SN = both_SN.masked_fill(~may_SN & inside_SN, torch.finfo(both_SN.dtype).max)
        rank_SN = rank_SN.scatter_(1, first_S1, float("inf"))
        return cls(rank_SN.argsort(dim=1, stable=True), torch.where(may_SN, near_SN, first_S1), rank_SN)

    def affordable(self, left_S: Tensor, at_most: int) -> Tensor:
        """How many of the cheapest joins cost no more than ``left_S`` together: int64 [S], at most ``at_most``."""
        cost_SQ = self.cost_SN.gather(1, self.order_SN[:, :at_most])
        return (cost_SQ.clamp(min=0.0).cumsum(1) <= left_S[:, None]).sum(1)

    def joins(self, num_joins: tuple[int, ...]) -> Tensor:
        """The point that each one becomes a part of by the cheapest joins, itself if it stays: int64 [S, N]."""
        device, (num_segments, width) = self.order_SN.device, self.order_SN.shape
        source_SQ = self.order_SN[:, : max(num_joins)]
        target_SQ = self.target_SN.gather(1, source_SQ)
        target_SQ = torch.where(inside(num_joins, target_SQ.shape[1], device), target_SQ, source_SQ)
        index_SN = torch.arange(width, device=device).expand(num_segments, -1)
        into_SN = index_SN.scatter(1, source_SQ, target_SQ)
        for _ in range((max(num_joins) - 1).bit_length()):  # to the end of every chain of joins
            into_SN = into_SN.gather(1, into_SN)
        return into_SN


def _nearest(points: _Points, square_SN: Tensor, weight_SN: Tensor) -> tuple[Tensor, Tensor]:
    """What it costs least to join, and the first such point: [S, N] each; infinite where there is none.

    A block of rows at a time, so that no N x N map of a longer segment is ever whole in memory.

    Args:
        points: as they are in this round.
        square_SN: their products with themselves; infinite behind a segment's end.
        weight_SN: their weights.
    """
    inverse_SN, best = weight_SN.reciprocal(), []
    for start in range(0, weight_SN.shape[1], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        cost_SRN = square_SN[:, rows, None] + square_SN[:, None]
        cost_SRN.sub_(points.products(rows), alpha=2)
        cost_SRN.div_(inverse_SN[:, rows, None] + inverse_SN[:, None])
        cost_SRN.diagonal(offset=start, dim1=1, dim2=2).fill_(float("inf"))
        best.append(cost_SRN.min(-1))
    return torch.cat([b.values for b in best], 1), torch.cat([b.indices for b in best], 1)


def _prices(
    points: _Points, square_SN: Tensor, weight_SN: Tensor, cost_SN: Tensor, near_SN: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether each point may join its nearest, and at what cost: [S, N] each; see `_Ranked`."""
    index_SN = torch.arange(near_SN.shape[1], device=near_SN.device)
    third_SN, near_cost_SN = near_SN.gather(1, near_SN), cost_SN.gather(1, near_SN)
    may_SN = (near_cost_SN < cost_SN) | ((near_cost_SN == cost_SN) & (near_SN < index_SN))
    near_weight_SN, third_weight_SN = weight_SN.gather(1, near_SN), weight_SN.gather(1, third_SN)
    distance_SN = square_SN + square_SN.gather(1, third_SN) - 2 * points.products_with(third_SN)
    with_near_SN = weight_SN + near_weight_SN
    # Lance and Williams: the cost of joining the union of two points, from those among the three
    both_SN = with_near_SN * cost_SN + weight_SN * third_weight_SN * distance_SN - weight_SN * near_cost_SN
    both_SN = both_SN / (with_near_SN + third_weight_SN)
    return may_SN, torch.where(third_SN == index_SN, cost_SN, both_SN)


def _numbers(into_SN: Tensor, lengths: tuple[int, ...], width: int) -> Tensor:
    """The group of each point after a round, int64 [S, N]; ``width`` behind a segment's end."""
    own_SN = into_SN == torch.arange(into_SN.shape[1], device=into_SN.device)
    number_SN = (own_SN.cumsum(1) - 1).gather(1, into_SN)
    return number_SN.masked_fill(~inside(lengths, into_SN.shape[1], into_SN.device), width)

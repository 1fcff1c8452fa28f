"""Merges points by agglomeration in Triton: all rounds of a segment in one launch.

One program has one segment, and everything that it keeps from step to step lies in memory that no other program reads:
between steps its threads wait for each other, and nothing waits for the host. A kernel for each step of a round would
be 44 launches of a cut to a half and 88 of one to a quarter, each with 20 to 50 us of Python, for work of a few
microseconds; as many programs as there are segments are fewer than a GPU has multiprocessors, which is the price.
`illava.reducers.ops.agglomeration` says what a round is, and is the reference: the same formulas in the same order, so
that equal costs tie alike.

Shape suffixes: S segments, N points of the longest one, R points of a block of rows, C of a block of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_POINTS = 1024  # of a segment: a program has a number of each in its registers
_NUM_INTEGERS, _NUM_FLOATS = tl.constexpr(6), tl.constexpr(4)  # of each point, kept between the steps
_LARGEST = tl.constexpr(3.4028234663852886e38)  # what a join costs that is not wanted, as in the reference


def join_in_rounds(product_SNN: Tensor, weight_SN: Tensor, count_SX: Tensor) -> Tensor:
    """The group of each point after all rounds: int64 [S, N].

    Args:
        product_SNN: float32 products of the points; overwritten.
        weight_SN: float32, positive.
        count_SX: int32 groups before the first round and after each.
    """
    num_segments, width = weight_SN.shape
    device = weight_SN.device
    group_SN = torch.empty(num_segments, width, dtype=torch.long, device=device)
    integers = torch.empty(num_segments, _NUM_INTEGERS.value, width, dtype=torch.int32, device=device)
    floats = torch.empty(num_segments, _NUM_FLOATS.value, width, dtype=torch.float32, device=device)
    _agglomerate[(num_segments,)](
        product_SNN, torch.empty_like(product_SNN), weight_SN.contiguous(), count_SX, group_SN, integers, floats,
        count_SX.shape[1] - 1, width,
        BLOCK_N=max(16, triton.next_power_of_2(width)), ROWS=32, COLUMNS=64,
        num_warps=16, enable_fp_fusion=False,
    )  # fmt: skip
    return group_SN


@triton.jit
def _agglomerate(
    product, spare, weight, count, group, integers, floats, num_rounds, width,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One segment."""
    segment = tl.program_id(0).to(tl.int64)
    product += segment * width * width
    spare += segment * width * width
    group += segment * width
    count += segment * (num_rounds + 1)
    near = integers + segment * width * _NUM_INTEGERS
    into, number, order = near + width, near + 2 * width, near + 3 * width
    begin, root_number = near + 4 * width, near + 5 * width
    own_weight = floats + segment * width * _NUM_FLOATS
    new_weight, cost, price = own_weight + width, own_weight + 2 * width, own_weight + 3 * width
    point_N = tl.arange(0, BLOCK_N)
    is_cell_N = point_N < width
    tl.store(group + point_N, point_N.to(tl.int64), mask=is_cell_N)
    tl.store(own_weight + point_N, tl.load(weight + segment * width + point_N, mask=is_cell_N), mask=is_cell_N)
    tl.debug_barrier()
    for turn in range(num_rounds):
        num, left = tl.load(count + turn), tl.load(count + turn + 1)
        if left < num:
            _nearest(product, own_weight, cost, near, num, width, ROWS, COLUMNS)
            tl.debug_barrier()
            _rank(product, own_weight, cost, near, price, into, num, width, BLOCK_N)
            tl.debug_barrier()
            _take_cheapest(price, into, num, num - left, ROWS, COLUMNS)
            tl.debug_barrier()
            _follow(into, num, BLOCK_N)
            _give_numbers(into, root_number, number, num, BLOCK_N)
            tl.debug_barrier()
            held_N = tl.load(group + point_N, mask=is_cell_N, other=0)
            tl.store(group + point_N, tl.load(number + held_N, mask=held_N < num, other=0).to(tl.int64), mask=is_cell_N)
            _sort_by_number(number, order, begin, num, ROWS, COLUMNS)
            tl.debug_barrier()
            _add_weights(own_weight, new_weight, order, begin, num, left, BLOCK_N)
            tl.debug_barrier()
            _means(product, spare, own_weight, new_weight, order, begin, num, left, num, width, ROWS, COLUMNS)
            tl.debug_barrier()
            _means(spare, product, own_weight, new_weight, order, begin, num, left, left, width, ROWS, COLUMNS)
            tl.debug_barrier()
            tl.store(own_weight + point_N, tl.load(new_weight + point_N, mask=point_N < left), mask=point_N < left)
            tl.debug_barrier()


@triton.jit
def _nearest(product, weight, cost, near, num, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What each point costs least to join, and the first such point."""
    for first in range(0, num, ROWS):
        row_R = first + tl.arange(0, ROWS)
        is_row_R = row_R < num
        square_R = tl.load(product + row_R * width + row_R, mask=is_row_R, other=0.0)
        inverse_R = _inverse(tl.load(weight + row_R, mask=is_row_R, other=1.0))
        least_R = tl.full([ROWS], float("inf"), tl.float32)
        at_R = tl.zeros([ROWS], tl.int32)
        for start in range(0, num, COLUMNS):
            column_C = start + tl.arange(0, COLUMNS)
            is_column_C = column_C < num
            square_C = tl.load(product + column_C * width + column_C, mask=is_column_C, other=0.0)
            inverse_C = _inverse(tl.load(weight + column_C, mask=is_column_C, other=1.0))
            is_cell_RC = is_row_R[:, None] & is_column_C[None, :]
            at_RC = row_R[:, None] * width + column_C[None, :]
            between_RC = tl.load(product + at_RC, mask=is_cell_RC, other=0.0)
            cost_RC = square_R[:, None] + square_C[None, :] - 2.0 * between_RC
            cost_RC = tl.div_rn(cost_RC, inverse_R[:, None] + inverse_C[None, :])
            is_other_RC = is_cell_RC & (row_R[:, None] != column_C[None, :])
            cost_RC = tl.where(is_other_RC, cost_RC, float("inf"))
            low_R, low_at_R = tl.min(cost_RC, 1, return_indices=True)
            is_less_R = low_R < least_R
            at_R = tl.where(is_less_R, start + low_at_R, at_R)
            least_R = tl.where(is_less_R, low_R, least_R)
        tl.store(cost + row_R, least_R, mask=is_row_R)
        tl.store(near + row_R, at_R, mask=is_row_R)


@triton.jit
def _inverse(weight_X):
    return tl.div_rn(weight_X * 0.0 + 1.0, weight_X)


@triton.jit
def _rank(product, weight, cost, near, price, into, num, width, BLOCK_N: tl.constexpr):
    """What each point would join, and the price by which joins are ranked."""
    point_N = tl.arange(0, BLOCK_N)
    is_point_N = point_N < num
    cost_N = tl.load(cost + point_N, mask=is_point_N, other=float("inf"))
    cheapest = tl.argmin(cost_N, 0)
    near_N = tl.load(near + point_N, mask=is_point_N, other=0)
    near_cost_N = tl.load(cost + near_N, mask=is_point_N, other=0.0)
    third_N = tl.load(near + near_N, mask=is_point_N, other=0)
    weight_N = tl.load(weight + point_N, mask=is_point_N, other=1.0)
    third_weight_N = tl.load(weight + third_N, mask=is_point_N, other=1.0)
    with_near_N = weight_N + tl.load(weight + near_N, mask=is_point_N, other=1.0)
    square_N = tl.load(product + point_N * width + point_N, mask=is_point_N, other=0.0)
    third_square_N = tl.load(product + third_N * width + third_N, mask=is_point_N, other=0.0)
    between_N = tl.load(product + point_N * width + third_N, mask=is_point_N, other=0.0)
    distance_N = square_N + third_square_N - 2.0 * between_N
    both_N = with_near_N * cost_N + weight_N * third_weight_N * distance_N - weight_N * near_cost_N
    both_N = tl.div_rn(both_N, with_near_N + third_weight_N)
    price_N = tl.where(third_N == point_N, cost_N, both_N)
    may_N = (near_cost_N < cost_N) | ((near_cost_N == cost_N) & (near_N < point_N))
    price_N = tl.where(may_N & (price_N < _LARGEST), price_N, _LARGEST)  # what is no number would be counted twice
    tl.store(price + point_N, tl.where(point_N == cheapest, float("inf"), price_N), mask=is_point_N)
    tl.store(into + point_N, tl.where(may_N, near_N, cheapest), mask=is_point_N)


@triton.jit
def _num_before(keys, own_R, row_R, num, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many keys are less than each of these, and how many are equal and stand before it."""
    num_less_R = tl.zeros([ROWS], tl.int32)
    num_equal_R = tl.zeros([ROWS], tl.int32)
    for start in range(0, num, COLUMNS):
        column_C = start + tl.arange(0, COLUMNS)
        key_C = tl.load(keys + column_C, mask=column_C < num, other=0)
        is_less_RC = (key_C[None, :] < own_R[:, None]) & (column_C < num)[None, :]
        is_equal_RC = (key_C[None, :] == own_R[:, None]) & (column_C[None, :] < row_R[:, None])
        num_less_R += tl.sum(is_less_RC.to(tl.int32), 1)
        num_equal_R += tl.sum(is_equal_RC.to(tl.int32), 1)
    return num_less_R, num_equal_R


@triton.jit
def _take_cheapest(price, into, num, num_joins, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Points whose join is not among the cheapest become their own."""
    for first in range(0, num, ROWS):
        row_R = first + tl.arange(0, ROWS)
        own_R = tl.load(price + row_R, mask=row_R < num, other=0.0)
        num_less_R, num_equal_R = _num_before(price, own_R, row_R, num, ROWS, COLUMNS)
        stays_R = num_less_R + num_equal_R >= num_joins
        tl.store(into + row_R, row_R, mask=stays_R & (row_R < num))


@triton.jit
def _follow(into, num, BLOCK_N: tl.constexpr):
    """Go to the end of every chain of joins: each turn doubles the way, whichever thread is first."""
    point_N = tl.arange(0, BLOCK_N)
    reach = 1
    while reach < num:
        next_N = tl.load(into + point_N, mask=point_N < num, other=0)
        next_N = tl.load(into + next_N, mask=point_N < num, other=0)
        tl.debug_barrier()
        tl.store(into + point_N, next_N, mask=point_N < num)
        tl.debug_barrier()
        reach *= 2


@triton.jit
def _give_numbers(into, root_number, number, num, BLOCK_N: tl.constexpr):
    """Count groups in the order of the points that they end in."""
    point_N = tl.arange(0, BLOCK_N)
    is_point_N = point_N < num
    root_N = tl.load(into + point_N, mask=is_point_N, other=-1)
    is_root_N = (root_N == point_N) & is_point_N
    tl.store(root_number + point_N, tl.cumsum(is_root_N.to(tl.int32), 0) - 1, mask=is_root_N)
    tl.debug_barrier()
    tl.store(number + point_N, tl.load(root_number + root_N, mask=is_point_N, other=0), mask=is_point_N)


@triton.jit
def _sort_by_number(number, order, begin, num, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Points by group, in their order within it, and where each group begins."""
    for first in range(0, num, ROWS):
        row_R = first + tl.arange(0, ROWS)
        is_row_R = row_R < num
        own_R = tl.load(number + row_R, mask=is_row_R, other=0)
        num_less_R, num_equal_R = _num_before(number, own_R, row_R, num, ROWS, COLUMNS)
        tl.store(order + num_less_R + num_equal_R, row_R, mask=is_row_R)
        tl.store(begin + own_R, num_less_R, mask=is_row_R & (num_equal_R == 0))


@triton.jit
def _add_weights(weight, new_weight, order, begin, num, num_groups, BLOCK_N: tl.constexpr):
    """The sum of each group's weights."""
    group_N = tl.arange(0, BLOCK_N)
    is_group_N = group_N < num_groups
    begin_N = tl.load(begin + group_N, mask=is_group_N, other=0)
    end_N = tl.load(begin + group_N + 1, mask=group_N + 1 < num_groups, other=num)
    size_N = tl.where(is_group_N, end_N - begin_N, 0)
    sum_N = tl.zeros([BLOCK_N], tl.float32)
    for place in range(0, tl.max(size_N, 0)):
        member_N = tl.load(order + begin_N + place, mask=place < size_N, other=0)
        sum_N += tl.load(weight + member_N, mask=place < size_N, other=0.0)
    tl.store(new_weight + group_N, sum_N, mask=is_group_N)


@triton.jit
def _means(
    source, target, weight, new_weight, order, begin, num, num_groups, num_columns, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weighted means of rows by group, written as columns: done twice it groups rows and columns."""
    for first in range(0, num_groups, ROWS):
        group_R = first + tl.arange(0, ROWS)
        is_group_R = group_R < num_groups
        begin_R = tl.load(begin + group_R, mask=is_group_R, other=0)
        end_R = tl.load(begin + group_R + 1, mask=group_R + 1 < num_groups, other=num)
        size_R = tl.where(is_group_R, end_R - begin_R, 0)
        total_R = tl.load(new_weight + group_R, mask=is_group_R, other=1.0)
        for start in range(0, num_columns, COLUMNS):
            column_C = start + tl.arange(0, COLUMNS)
            is_column_C = column_C < num_columns
            sum_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
            for place in range(0, tl.max(size_R, 0)):
                is_member_R = place < size_R
                member_R = tl.load(order + begin_R + place, mask=is_member_R, other=0)
                share_R = tl.div_rn(tl.load(weight + member_R, mask=is_member_R, other=0.0), total_R)
                at_RC = member_R[:, None] * width + column_C[None, :]
                value_RC = tl.load(source + at_RC, mask=is_member_R[:, None] & is_column_C[None, :], other=0.0)
                sum_RC += share_R[:, None] * value_RC
            at_RC = column_C[None, :] * width + group_R[:, None]
            tl.store(target + at_RC, sum_RC, mask=is_group_R[:, None] & is_column_C[None, :])

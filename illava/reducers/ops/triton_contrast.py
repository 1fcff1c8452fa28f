"""Measures how much tokens differ from what lies around them, in Triton: all of it in one launch.

One program has a block of a segment's rows. It makes the weights of its surroundings from the coordinates, a block of
columns at a time, once for each block of channels, so that no map of weights is ever in memory.
`illava.reducers.ops.contrast` says what is measured, and is the reference.

Shape suffixes: S segments, N tokens of the longest one, R tokens of a block of rows, C of a block of columns, D
channels, X of a block of channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def contrasts(point_SND: Tensor, size_SN: Tensor, coord_SN3: Tensor, resolution: float, least: float) -> Tensor:
    """Squared distance of each token to the mean of its surroundings: float32 [S, N].

    Args:
        point_SND: float32.
        size_SN: float32, 0 behind a segment's end.
        coord_SN3: float32 (frame, row, col); row = col = -1 of separators.
        resolution: steps in which a distance of 1 is rounded.
        least: added to each.
    """
    num_segments, width, channels = point_SND.shape
    contrast_SN = torch.empty_like(size_SN)
    rows = 32
    _contrast[(num_segments, triton.cdiv(width, rows))](
        point_SND.contiguous(), size_SN.contiguous(), coord_SN3.contiguous(), contrast_SN,
        resolution, least, width, channels,
        ROWS=rows, COLUMNS=32, CHANNELS=64, num_warps=4,
    )  # fmt: skip
    return contrast_SN


@triton.jit
def _contrast(
    point, size, coord, contrast, resolution, least, width, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A block of rows of one segment."""
    segment = tl.program_id(0).to(tl.int64)
    point += segment * width * channels
    size += segment * width
    coord += segment * width * 3
    contrast += segment * width
    row_R = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row_R = row_R < width
    frame_R, y_R, x_R = _place(coord, row_R, is_row_R)
    square_R = tl.zeros([ROWS], tl.float32)
    for first in range(0, channels, CHANNELS):
        channel_X = first + tl.arange(0, CHANNELS)
        is_channel_X = channel_X < channels
        sum_RX = tl.zeros([ROWS, CHANNELS], tl.float32)
        total_R = tl.zeros([ROWS], tl.float32)
        for start in range(0, width, COLUMNS):
            column_C = start + tl.arange(0, COLUMNS)
            is_column_C = column_C < width
            frame_C, y_C, x_C = _place(coord, column_C, is_column_C)
            down_RC, right_RC = y_R[:, None] - y_C[None, :], x_R[:, None] - x_C[None, :]
            square_RC = down_RC * down_RC + right_RC * right_RC
            is_near_RC = (square_RC > 0.0) & (frame_R[:, None] == frame_C[None, :])
            is_near_RC = is_near_RC & (y_R >= 0.0)[:, None] & (y_C >= 0.0)[None, :]
            cube_RC = tl.where(is_near_RC, square_RC * tl.sqrt(square_RC), 1.0)
            size_C = tl.load(size + column_C, mask=is_column_C, other=0.0)
            weight_RC = tl.where(is_near_RC, size_C[None, :] / cube_RC, 0.0)
            at_CX = column_C[:, None] * channels + channel_X[None, :]
            point_CX = tl.load(point + at_CX, mask=is_column_C[:, None] & is_channel_X[None, :], other=0.0)
            sum_RX += tl.dot(weight_RC, point_CX, input_precision="ieee")
            total_R += tl.sum(weight_RC, 1)
        at_RX = row_R[:, None] * channels + channel_X[None, :]
        point_RX = tl.load(point + at_RX, mask=is_row_R[:, None] & is_channel_X[None, :], other=0.0)
        apart_RX = sum_RX / tl.where(total_R == 0.0, 1.0, total_R)[:, None] - point_RX
        square_R += tl.sum(apart_RX * apart_RX, 1)
    stepped_R = tl.floor(square_R * resolution + 0.5) / resolution + least
    tl.store(contrast + row_R, stepped_R, mask=is_row_R)


@triton.jit
def _place(coord, token, is_token):
    """Frame, row and column of a block of tokens."""
    return (
        tl.load(coord + 3 * token, mask=is_token, other=0.0),
        tl.load(coord + 3 * token + 1, mask=is_token, other=0.0),
        tl.load(coord + 3 * token + 2, mask=is_token, other=0.0),
    )

"""Measures how much tokens differ from what lies around them in their picture.

Shape suffixes: S segments, N tokens of the longest segment, R tokens of a block of rows, T tokens packed, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava.attention.backend import kernels_on
from illava.tokens import pad, unpad

_RESOLUTION = 2**16
_LEAST = 2**-10  # what looks like all around it still counts for something; about 2 degrees
_BLOCK_ROWS = 1024
_CPU_CELLS = 2**21  # of maps together, 8 MiB: more is fresh memory, zeroed page by page


def local_contrast(point_SND: Tensor, size_T: Tensor, coord_T3: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Squared distance of each token to the mean of all others of its frame, which count by size / distance^3: [T].

    Near ones count most, at any spacing of what earlier cuts left: no radius is to be chosen. A token that is alone in
    its frame has the distance to the origin, and so has a separator, which has no place and surrounds nothing. In steps
    of 2^-16, so that equal surroundings have equal contrast in nearly any order of sums, plus 2^-10. Never a whole
    N x N map of more than 1,024 tokens in memory.

    Args:
        point_SND: float32 points of length one, 0 behind a segment's end.
        size_T: float32, how many tokens each stands for.
        coord_T3: int64 (frame, row, col); of one picture or clip a segment; row = col = -1 of separators.
        lengths: tokens per segment.
    """
    coord_SN3, size_SN = pad(coord_T3.float(), lengths, 0.0), pad(size_T, lengths, 0.0)
    if kernels_on(point_SND.device) == "triton":
        from illava.reducers.ops.triton_contrast import contrasts

        return unpad(contrasts(point_SND, size_SN, coord_SN3, _RESOLUTION, _LEAST), lengths)
    square_SN = _squares(point_SND, size_SN, coord_SN3)
    return unpad(square_SN.mul_(_RESOLUTION).add_(0.5).floor_().div_(_RESOLUTION).add_(_LEAST), lengths)


def _squares(point_SND: Tensor, size_SN: Tensor, coord_SN3: Tensor) -> Tensor:
    """The distances, by a few segments and a block of rows at a time: [S, N]."""
    num_segments, width = size_SN.shape
    together = num_segments if point_SND.is_cuda else max(1, _CPU_CELLS // max(1, width * min(width, _BLOCK_ROWS)))
    parts = zip(*(value.split(together) for value in (point_SND, size_SN, coord_SN3)), strict=True)
    square_SN = torch.empty_like(size_SN)
    for place, (point, size, coord) in enumerate(parts):
        own = square_SN[place * together : (place + 1) * together]
        for start in range(0, width, _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            weight_SRN = _weights(coord[:, rows], coord, size)
            total_SR1 = weight_SRN.sum(2, keepdim=True)
            mean_SRD = torch.bmm(weight_SRN, point).div_(total_SR1.masked_fill_(total_SR1 == 0, 1.0))
            own[:, rows] = mean_SRD.sub_(point[:, rows]).square_().sum(2)
    return square_SN


def _weights(coord_SR3: Tensor, coord_SN3: Tensor, size_SN: Tensor) -> Tensor:
    """What each token counts for in the surroundings of each of a block: [S, R, N], 0 for itself and other frames."""
    frame_SR1, row_SR1, col_SR1 = coord_SR3[:, :, None].unbind(3)
    frame_S1N, row_S1N, col_S1N = coord_SN3[:, None].unbind(3)
    square_SRN = (row_SR1 - row_S1N).square_().add_((col_SR1 - col_S1N).square_())
    is_out_SRN = (square_SRN == 0).logical_or_(frame_SR1 != frame_S1N)
    is_out_SRN.logical_or_(row_SR1 < 0).logical_or_(row_S1N < 0)
    return square_SRN.mul_(square_SRN.sqrt()).reciprocal_().mul_(size_SN[:, None]).masked_fill_(is_out_SRN, 0.0)

"""Computes M-RoPE positions: rotary positions on three axes (time, row, column) for grids of vision tokens and text.

Text counts up on all axes together. A grid starts where the text before it ended, and gives every token its own time,
row and column; the text behind it starts behind the longer side of the grid. Positions are those of the unreduced
model, and kept tokens keep theirs. If a video lasts for more positions than its grid is wide, the text behind it, and
the answer, take positions that some of its tokens have: so does `generate` of the pinned transformers, while
transformers 4.x went on behind the largest position.

Shape suffixes: S rendered tokens (text and placeholders).

Source: transformers 5.23, models/qwen2_5_vl/modeling_qwen2_5_vl.py:Qwen2_5_VLModel.get_rope_index, tested equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """A grid of vision tokens in a rendered prompt, in the order time, row, column.

    Attributes:
        start: index of the first token.
        times, rows, cols: size of the grid.
        interval: positions between two times; need not be whole.
    """

    start: int
    times: int
    rows: int
    cols: int
    interval: float = 1.0


def mrope_positions(num_tokens: int, grids: Sequence[TokenGrid]) -> Tensor:
    """Compute the positions of every rendered token on the host: int64 [3, S].

    Args:
        num_tokens: S, text and vision.
        grids: the grids in the prompt, in any order.
    """
    parts, index, position = [], 0, 0
    for grid in sorted(grids, key=lambda grid: grid.start):
        parts.append(torch.arange(position, position + grid.start - index).expand(3, -1))
        position += grid.start - index
        time = (torch.arange(grid.times) * grid.interval).long()
        axes = torch.meshgrid(time, torch.arange(grid.rows), torch.arange(grid.cols), indexing="ij")
        parts.append(torch.stack(axes).flatten(1) + position)
        position += max(grid.rows, grid.cols)
        index = grid.start + grid.times * grid.rows * grid.cols
    parts.append(torch.arange(position, position + num_tokens - index).expand(3, -1))
    return torch.cat(parts, 1)

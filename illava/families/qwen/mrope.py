"""M-RoPE: rotary positions on three axes (time, row, column) of a prompt with grids of vision tokens in it.

Text counts on, all axes alike. A grid starts where the text before it ended and gives every token its own time, row
and column; what follows goes on behind the longer side of the grid. Knows nothing of reduction: positions are those of
the unreduced model, and survivors keep theirs. Where a video lasts for more positions than its grid is wide, the text
behind it, and the answer, take positions that some of its tokens have: so it is in the pinned transformers' `generate`,
while its 4.x went on behind the largest.

Shape suffixes: S prompt slots.

Source: transformers 5.23, models/qwen2_5_vl/modeling_qwen2_5_vl.py:Qwen2_5_VLModel.get_rope_index, tested equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Vision tokens in a prompt, a slot for each, in the order time, row, column.

    Attributes:
        start: the slot of the first.
        times, rows, cols: of the grid.
        interval: positions between two times; need not be whole.
    """

    start: int
    times: int
    rows: int
    cols: int
    interval: float = 1.0


def mrope_positions(num_tokens: int, grids: Sequence[TokenGrid]) -> Tensor:
    """Positions of every prompt slot on the host: int64 [3, S].

    Args:
        num_placeholders: of the prompt, text and vision.
        grids: those in it, in any order.
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

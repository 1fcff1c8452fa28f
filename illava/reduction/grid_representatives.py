"""Where the content of reduced tokens came from: from an assignment back to the cells of a tile's grid.

Knows nothing of features, layouts or models.

Shape suffixes: T tokens in, K tokens out, E edges, P cells of all tiles, F tiles, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from illava.tokens import Assignment


def destinations(assignment: Assignment) -> Tensor:
    """The output token that each input token went into: int64 [T], -1 where it was discarded.

    A token that keeps its place goes to that place; one that feeds several mixtures, to the one it weighs most in
    (among equals, the later).
    """
    num_edges = assignment.source_E.shape[0]
    weight_T = assignment.weight_E.new_zeros(assignment.num_tokens)
    weight_T = weight_T.scatter_reduce(0, assignment.source_E, assignment.weight_E, "amax")
    row_E = assignment.target_G.repeat_interleave(assignment.size_G, output_size=num_edges)
    row_E = torch.where(assignment.weight_E == weight_T[assignment.source_E], row_E, -1)
    row_T = torch.full_like(weight_T, -1, dtype=torch.long).scatter_reduce(0, assignment.source_E, row_E, "amax")
    row_T[assignment.kept_K] = torch.arange(assignment.num_kept, device=row_T.device)
    return row_T


def representatives(assignments: Sequence[Assignment], num_cells: int, device: torch.device) -> Tensor:
    """The token that stands for each cell after all assignments: int64 [P], -1 where nothing of the cell is left."""
    representative_P = torch.arange(num_cells, device=device)
    for assignment in assignments:
        row_T = destinations(assignment)
        representative_P = torch.where(representative_P >= 0, row_T[representative_P.clamp(min=0)], -1)
    return representative_P


def fill_gaps(representative_FRC: Tensor) -> Tensor:
    """Give each ownerless cell (-1, left by pruning) the owner of a cell next to it, growing outwards from survivors.

    Of several neighbours the one above, left, below, right comes first. A tile without any survivor stays ownerless.
    """
    for _ in range(sum(representative_FRC.shape[1:])):  # no cell is farther from a survivor
        if not bool((representative_FRC < 0).any()):
            break
        padded = torch.nn.functional.pad(representative_FRC, (1, 1, 1, 1), value=-1)
        grown = representative_FRC
        for near in (padded[:, :-2, 1:-1], padded[:, 1:-1, :-2], padded[:, 2:, 1:-1], padded[:, 1:-1, 2:]):
            grown = torch.where(grown < 0, near, grown)
        representative_FRC = grown
    return representative_FRC

"""Finds the token that represents each cell of a tile's grid after reductions.

Shape suffixes: T tokens in, K tokens out, E edges, P cells of all tiles, F tiles, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from illava.tokens import Assignment


def destinations(assignment: Assignment) -> Tensor:
    """The output token that each input token went into: int64 [T], -1 for a discarded token.

    A kept token goes to its own output token. A token that is a source of several mixtures goes to the one in which it
    weighs most (among equals, the later one).
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
    """The token that represents each cell after all assignments: int64 [P], -1 where nothing of the cell is left."""
    representative_P = torch.arange(num_cells, device=device)
    for assignment in assignments:
        row_T = destinations(assignment)
        representative_P = torch.where(representative_P >= 0, row_T[representative_P.clamp(min=0)], -1)
    return representative_P


def merged_counts(assignments: Sequence[Assignment], num_cells: int, num_tokens: int, device: torch.device) -> Tensor:
    """How many cells were merged into each of the tokens that are left: float32 [num_tokens], at least 1."""
    representative_P = representatives(assignments, num_cells, device)
    count_T = torch.zeros(num_tokens, device=device)
    count_T.index_add_(0, representative_P.clamp(min=0), (representative_P >= 0).float())
    return count_T.clamp_(min=1)


def fill_gaps(representative_FRC: Tensor) -> Tensor:
    """Give each cell without a representative (-1, left by pruning) that of a neighbour, outwards from kept tokens.

    Of several neighbours the one above, left, below, right comes first. A tile without kept tokens stays at -1.
    """
    for _ in range(sum(representative_FRC.shape[1:])):  # no cell is farther from a kept token
        if not bool((representative_FRC < 0).any()):
            break
        padded = torch.nn.functional.pad(representative_FRC, (1, 1, 1, 1), value=-1)
        grown = representative_FRC
        for near in (padded[:, :-2, 1:-1], padded[:, 1:-1, :-2], padded[:, 2:, 1:-1], padded[:, 1:-1, 2:]):
            grown = torch.where(grown < 0, near, grown)
        representative_FRC = grown
    return representative_FRC

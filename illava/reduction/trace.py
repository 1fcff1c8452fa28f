"""Records the reductions of a tower as mixing matrices on the host, separately for each visual input.

Shape suffixes: T tokens, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from illava.reducers import Stage
from illava.reduction.segments import starts
from illava.requests import TraceStep
from illava.tokens import Assignment


@dataclass(frozen=True, slots=True)
class VisionStep:
    """One reduction that was carried out.

    Attributes:
        stage: ``vision_block`` or ``vision_output``.
        block: 0-based, None after the tower.
        assignment: over all patches of the packed call; a CLS token is not among them.
        of_groups: the same over whole groups, as the reducer gave it.
        lengths_before: patches per segment before it.
        coord_K3: int64 (tile, row, col) of the patches after it.
    """

    stage: Stage
    block: int | None
    assignment: Assignment
    of_groups: Assignment
    lengths_before: tuple[int, ...]
    coord_K3: Tensor


@dataclass(frozen=True, slots=True)
class PackedTrace:
    """One step over all media of a packed call.

    Attributes:
        stage, block: as a `TraceStep` names them.
        matrix: makes the sparse float32 matrix [K, T], on any device.
        coord_K3: int64 (tile, row, col) of the tokens after it.
        tokens_before, tokens_after: tokens of each visual input.
    """

    stage: str
    block: int | None
    matrix: Callable[[], Tensor]
    coord_K3: Tensor
    tokens_before: tuple[int, ...]
    tokens_after: tuple[int, ...]

    def by_mm_item(self) -> list[TraceStep]:
        """Split the block-diagonal matrix into one sparse block for each visual input, on the host."""
        matrix = self.matrix().cpu()
        (row, col), value = matrix.indices(), matrix.values()
        row_bounds, col_bounds = starts(self.tokens_after), starts(self.tokens_before)
        edge_bounds = torch.searchsorted(row.contiguous(), torch.tensor(row_bounds)).tolist()
        coords = self.coord_K3.cpu().split(list(self.tokens_after))
        bounds = zip(pairwise(row_bounds), pairwise(col_bounds), pairwise(edge_bounds), coords, strict=True)
        steps = []
        for rows, cols, edges, coord_K3 in bounds:
            index = torch.stack([row[slice(*edges)] - rows[0], col[slice(*edges)] - cols[0]])
            size = (rows[1] - rows[0], cols[1] - cols[0])
            own = torch.sparse_coo_tensor(index, value[slice(*edges)], size, is_coalesced=True, check_invariants=False)
            steps.append(TraceStep(self.stage, self.block, own, visual_coords(coord_K3)))
        return steps


def media_traces(steps: Sequence[PackedTrace], num_media: int) -> list[tuple[TraceStep, ...]]:
    """The steps of each visual input."""
    apart = [step.by_mm_item() for step in steps]
    return [tuple(step[mm_index] for step in apart) for mm_index in range(num_media)]


def visual_coords(coord_K3: Tensor) -> Tensor:
    """(tile, row, col) -> (visual input, tile, row, col) with input 0, as in an `EncodedVisual`."""
    return torch.cat([coord_K3.new_zeros(coord_K3.shape[0], 1), coord_K3], dim=1)

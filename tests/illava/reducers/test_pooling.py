"""Pooling against torch's adaptive pooling on full grids, and by hand on torn ones."""

from __future__ import annotations

import pytest
import torch

from illava.reducers import Evidence, Pooling
from illava.tokens import Tokens, merge
from tests.support.closeness import assert_close
from tests.support.reducer_cases import assign_each, groups_matrix, ragged, segments

pytestmark = pytest.mark.numeric


def slow_pool(places: list[list[int]], grid: tuple[int, int]) -> dict[int, list[int]]:
    cells: dict[tuple, list[int]] = {}
    for i, (frame, row, col) in enumerate(places):
        if row < 0:
            cells["separator", i] = [i]
            continue
        rows = 1 + max(r for f, r, _ in places if f == frame)
        cols = 1 + max(c for f, _, c in places if f == frame)
        cell_row = row * grid[0] // rows if rows > grid[0] else row
        cell_col = col * grid[1] // cols if cols > grid[1] else col
        cells.setdefault((frame, cell_row, cell_col), []).append(i)
    groups = {}
    for members in cells.values():
        centre = [sum(places[m][axis] for m in members) / len(members) for axis in (1, 2)]
        gap = {m: round(sum((places[m][a + 1] - centre[a]) ** 2 for a in (0, 1)), 5) for m in members}
        groups[min(members, key=lambda m: (gap[m], m))] = members
    return groups


def test_cells_of_true_places():
    for seed, missing in ((30, 0.0), (31, 0.4)):
        tokens, evidence = ragged(seed, ((2, 5, 7), (1, 3, 3), (1, 1, 1), (3, 2, 8)), missing=missing)
        tokens.coord_T3[4, 1:] = -1  # a separator
        for grid in ((2, 3), (1, 1), (4, 10)):
            blocks = assign_each(Pooling(grid=grid), tokens, evidence, "vision_output")
            for block, (own_tokens, own) in zip(blocks, segments(tokens, evidence), strict=True):
                groups = slow_pool(own_tokens.coord_T3.tolist(), grid)
                expected = groups_matrix(groups, own.size_T.tolist(), own_tokens.lengths[0])
                assert_close(block, expected)


def test_even_grids_equal_adaptive_average_pooling():
    tokens, _ = ragged(32, ((3, 6, 8),))
    pooled = merge(Pooling(grid=(3, 2)).assign(tokens, Evidence(), "vision_output"), tokens.hidden_TD)
    images = tokens.hidden_TD.view(3, 6, 8, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.adaptive_avg_pool2d(images, (3, 2)).permute(0, 2, 3, 1).flatten(0, 2)
    assert_close(pooled, expected)


def test_small_frames_are_left_alone():
    tokens, evidence = ragged(33, ((2, 3, 3),))
    untouched = Tokens(tokens.hidden_TD, tokens.lengths, tokens.coord_T3)
    assert Pooling(grid=(3, 3)).assign(untouched, evidence, "vision_output").num_kept == 18

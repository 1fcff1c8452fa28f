"""Frame merging against a loop over cells."""

from __future__ import annotations

import pytest
import torch

from illava.reducers import FrameMerging
from tests.support.closeness import assert_close
from tests.support.reducer_cases import assign_each, groups_matrix, ragged, segments


def slow_frames(coord_T3, sizes: list[float], num_frames: int) -> torch.Tensor:
    places = [tuple(place) for place in coord_T3.tolist()]
    frames = sorted({frame for frame, _, _ in places})
    groups = {}
    for start in range(0, len(frames), num_frames):
        own = frames[start : start + num_frames]
        middle = (len(own) - 1) // 2
        for cell in {(row, col) for frame, row, col in places if frame in own}:
            members = [n for n, (frame, *at) in enumerate(places) if frame in own and tuple(at) == cell]
            first = min(members, key=lambda n: (abs(own.index(places[n][0]) - middle), n))
            groups[first] = members
    return groups_matrix(groups, sizes, len(places))


@pytest.mark.parametrize("num_frames", [2, 3, 5])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_cells_of_neighbouring_frames_become_their_weighted_mean(num_frames, missing):
    tokens, evidence = ragged(60, ((5, 2, 3), (1, 3, 3), (4, 2, 2), (7, 1, 4)), missing=missing)
    blocks = assign_each(FrameMerging(num_frames=num_frames), tokens, evidence, "vision_block")
    for block, (own_tokens, own) in zip(blocks, segments(tokens, evidence), strict=True):
        assert_close(block, slow_frames(own_tokens.coord_T3, own.size_T.tolist(), num_frames))


@pytest.mark.parametrize(("num_frames", "standing"), [(2, (0, 2, 4, 6)), (3, (1, 4, 6)), (4, (1, 5)), (9, (3,))])
def test_the_middle_frame_of_each_group_stands(num_frames, standing):
    reducer = FrameMerging(num_frames=num_frames)
    assert reducer.frames_kept(7) == standing
    tokens, evidence = ragged(61, ((7, 2, 3),))
    kept_K = reducer.assign(tokens, evidence, "vision_block").kept_K
    assert tuple(tokens.coord_T3[kept_K, 0].unique().tolist()) == standing


def test_frames_of_gone_numbers_are_neighbours_all_the_same():
    """A second step joins what stands next to one another, whatever their times."""
    tokens, evidence = ragged(62, ((8, 2, 2),))
    tokens.coord_T3[:, 0] *= 3
    matrix = assign_each(FrameMerging(), tokens, evidence, "vision_block")[0]
    assert ((matrix > 0).sum(1) == 2).all()

"""Which kept token represents a cell: through merges, shared sources, prunings and chains of them."""

from __future__ import annotations

import torch

from illava.reducers.illava import merge_least
from illava.reduction.grid_representatives import destinations, fill_gaps, representatives
from illava.tokens import Assignment, prune


def test_a_merged_token_goes_to_the_mixture_and_a_kept_one_to_itself():
    score = torch.tensor([0.30, 0.10, 0.20, 0.05, 0.35])
    assert destinations(merge_least(score, (5,), (3,))).tolist() == [0, 1, 1, 1, 2]


def test_a_pruned_token_goes_nowhere():
    assert destinations(prune(torch.tensor([1, 3]), (2,), 5)).tolist() == [-1, 0, -1, 1, -1]


def test_a_shared_source_goes_where_it_weighs_most():
    assignment = Assignment(
        num_tokens=5,
        lengths=(2,),
        kept_K=torch.tensor([0, 4]),
        source_E=torch.tensor([0, 1, 2, 2, 3, 4]),
        weight_E=torch.tensor([0.5, 0.4, 0.1, 0.3, 0.3, 0.4]),
        target_G=torch.tensor([0, 1]),
        size_G=torch.tensor([3, 3]),
    )
    assert destinations(assignment).tolist() == [0, 0, 1, 1, 1]


def test_owners_follow_a_chain_as_the_composed_matrix_does():
    torch.manual_seed(0)
    lengths, assignments, matrix = (9, 9), [], torch.eye(18)
    for kept in ((7, 7), (4, 4), (3, 3)):
        assignment = merge_least(torch.rand(sum(lengths)), lengths, kept)
        matrix, lengths = assignment.matrix().to_dense() @ matrix, kept
        assignments.append(assignment)
    representative = representatives(assignments, 18, torch.device("cpu"))
    assert ((matrix > 0).sum(0) == 1).all()
    assert representative.tolist() == matrix.argmax(0).tolist()


def test_what_is_gone_stays_gone_through_later_steps():
    first = prune(torch.tensor([0, 2, 3]), (3,), 4)
    then = merge_least(torch.tensor([0.1, 0.2, 0.9]), (3,), (2,))
    assert representatives([first, then], 4, torch.device("cpu")).tolist() == [0, -1, 0, 1]


def test_gaps_take_the_nearest_kept_tokens_the_one_above_first():
    grid = torch.full((2, 3, 3), -1)
    grid[0, 0, 0], grid[0, 2, 2], grid[1, 1, 1] = 4, 9, 7
    filled = fill_gaps(grid)
    assert filled[0].tolist() == [[4, 4, 4], [4, 4, 9], [4, 9, 9]]
    assert (filled[1] == 7).all()
    assert torch.equal(fill_gaps(filled), filled)


def test_a_tile_without_kept_tokens_ends():
    assert (fill_gaps(torch.full((1, 3, 3), -1)) == -1).all()

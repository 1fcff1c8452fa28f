"""ToMe against a loop over the edges."""

from __future__ import annotations

import pytest
import torch

from illava.errors import PlanError
from illava.reducers import ToMe
from illava.tokens import merged_sizes
from tests.support.closeness import assert_close
from tests.support.reducer_cases import assign_each, groups_matrix, ragged, segments

pytestmark = pytest.mark.numeric


def slow_tome(keys, sizes: list[float], num_merged: int) -> torch.Tensor:
    n = len(keys)
    metric = keys.mean(1)
    edges = []
    for a in range(0, n, 2):
        cosines = {b: torch.cosine_similarity(metric[a], metric[b], dim=0).item() for b in range(1, n, 2)}
        if cosines:
            b = max(cosines, key=lambda b: (cosines[b], -b))
            edges.append((cosines[b], a, b))
    groups = {i: [i] for i in range(n)}
    for _, a, b in sorted(edges, key=lambda e: -e[0])[:num_merged]:
        groups[b].append(a)
        del groups[a]
    return groups_matrix(groups, sizes, n)


@pytest.mark.parametrize("reducer", [ToMe(num_merged=3), ToMe(keep_ratio=0.5), ToMe(keep_ratio=0.9)])
def test_the_best_edges_merge(reducer):
    tokens, evidence = ragged(40, ((2, 4, 5), (1, 3, 3), (1, 1, 6), (1, 5, 5)))
    blocks = assign_each(reducer, tokens, evidence, "vision_block")
    for block, (own_tokens, own) in zip(blocks, segments(tokens, evidence), strict=True):
        (n,) = own_tokens.lengths
        expected = slow_tome(own.keys_THd, own.size_T.tolist(), n - reducer.num_kept(n))
        assert_close(block, expected)


def test_sizes_add_up_over_two_layers():
    tokens, evidence = ragged(41, ((1, 6, 6), (1, 2, 5)))
    assignment = ToMe(keep_ratio=0.5).assign(tokens, evidence, "vision_block")
    size_K = merged_sizes(assignment, evidence.size_T)
    assert size_K[:18].sum() == evidence.size_T[:36].sum()
    assert size_K[18:].sum() == evidence.size_T[36:].sum()
    assert size_K.max() > evidence.size_T.max()


def test_more_than_half_is_refused():
    tokens, evidence = ragged(42, ((1, 1, 9),))
    assert ToMe(num_merged=5).assign(tokens, evidence, "vision_block").lengths == (4,)
    with pytest.raises(PlanError, match="at most half of 9 tokens in one step, not 6: spread the cut"):
        ToMe(num_merged=6).assign(tokens, evidence, "vision_block")
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.5"):
        ToMe(keep_ratio=0.4)

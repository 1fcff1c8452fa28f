"""Greedy merging against all pairs compared anew at every merge."""

from __future__ import annotations

import pytest
import torch

from illava.reducers import Greedy
from tests.support.closeness import assert_close
from tests.support.reducer_cases import assign_each, groups_matrix, ragged, segments

pytestmark = pytest.mark.numeric


def slow_greedy(keys, sizes: list[float], num_merged: int) -> torch.Tensor:
    key = {i: k.mean(0) for i, k in enumerate(keys)}
    size = dict(enumerate(sizes))
    groups = {i: [i] for i in key}
    for _ in range(num_merged):
        pairs = [(i, j) for i in key for j in key if i < j]
        i, j = max(pairs, key=lambda p: torch.cosine_similarity(key[p[0]], key[p[1]], dim=0).item())
        key[i] = (size[i] * key[i] + size[j] * key[j]) / (size[i] + size[j])
        size[i] += size[j]
        groups[i] += groups.pop(j)
        del key[j], size[j]
    return groups_matrix(groups, sizes, len(sizes))


@pytest.mark.parametrize("reducer", [Greedy(num_merged=1), Greedy(num_merged=7), Greedy(keep_ratio=0.2)])
@pytest.mark.parametrize("seed", [50, 51])
def test_the_most_similar_pair_merges_every_time(reducer, seed):
    tokens, evidence = ragged(seed, ((2, 3, 4), (1, 3, 3), (1, 1, 1), (1, 4, 4)))
    blocks = assign_each(reducer, tokens, evidence, "vision_block")
    for block, (own_tokens, own) in zip(blocks, segments(tokens, evidence), strict=True):
        (n,) = own_tokens.lengths
        expected = slow_greedy(own.keys_THd, own.size_T.tolist(), n - reducer.num_kept(n))
        assert_close(block, expected)
    assert any((block > 0).sum(1).max() > 2 for block in blocks) or reducer.num_merged == 1

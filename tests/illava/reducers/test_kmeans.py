"""k-means against nested loops."""

from __future__ import annotations

import pytest
import torch

from illava.reducers import KMeans
from tests.support.closeness import assert_close
from tests.support.reducer_cases import assign_each, groups_matrix, ragged, segments

pytestmark = pytest.mark.numeric


def slow_kmeans(hidden, sizes: list[float], k: int, num_iterations: int = 5) -> torch.Tensor:
    n = len(hidden)
    points = [(x / x.norm()).double() for x in hidden]
    centres = [points[int((i + 0.5) * n / k)] for i in range(k)]
    for _ in range(num_iterations):
        label = [min(range(k), key=lambda c: (points[i] - centres[c]).norm().item()) for i in range(n)]
        for c in range(k):
            members = [i for i in range(n) if label[i] == c]
            if members:
                total = sum(sizes[i] for i in members)
                centres[c] = sum(sizes[i] * points[i] for i in members) / total
    gap = [round((points[i] - centres[label[i]]).square().sum().item() * 2**16) for i in range(n)]
    groups = {}
    for c in range(k):
        members = [i for i in range(n) if label[i] == c]
        if members:
            groups[min(members, key=lambda i: gap[i])] = members
    for i in sorted(range(n), key=lambda i: -gap[i]):  # an empty cluster takes the farthest token that stands for none
        if len(groups) < k and i not in groups:
            for members in groups.values():
                if i in members:
                    members.remove(i)
            groups[i] = [i]
    return groups_matrix(groups, sizes, n)


@pytest.mark.parametrize("reducer", [KMeans(keep_ratio=0.3), KMeans(num_merged=4), KMeans(keep_per_frame=2)])
@pytest.mark.parametrize("seed", [60, 61])
def test_five_lloyd_iterations(reducer, seed):
    tokens, evidence = ragged(seed, ((2, 4, 5), (1, 3, 3), (1, 1, 1), (1, 5, 5)))
    blocks = assign_each(reducer, tokens, evidence, "vision_block")
    for block, (own_tokens, own) in zip(blocks, segments(tokens, evidence), strict=True):
        (n,) = own_tokens.lengths
        assert_close(block, slow_kmeans(own_tokens.hidden_TD, own.size_T.tolist(), reducer.num_kept(n)))


def test_the_iterations_are_five():
    tokens, evidence = ragged(63, ((1, 12, 12),), dim=4)
    (block,) = assign_each(KMeans(keep_per_frame=12), tokens, evidence, "vision_block")
    assert_close(block, slow_kmeans(tokens.hidden_TD, evidence.size_T.tolist(), 12))
    assert not torch.allclose(block, slow_kmeans(tokens.hidden_TD, evidence.size_T.tolist(), 12, num_iterations=6))


def test_an_empty_cluster_takes_the_farthest_token():
    tokens, evidence = ragged(62, ((1, 1, 8),))
    tokens.hidden_TD[4:7] = tokens.hidden_TD[2]  # two of the first centres are equal: one cluster stays empty
    evidence.size_T[:] = 1
    (block,) = assign_each(KMeans(keep_per_frame=4), tokens, evidence, "vision_block")
    assert block.shape == (4, 8)
    assert_close(block, slow_kmeans(tokens.hidden_TD, [1.0] * 8, 4))

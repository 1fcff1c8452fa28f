"""DivPrune against distances computed one by one."""

from __future__ import annotations

import pytest
import torch
from reducer_cases import assign_each, kept_places, ragged, segments

from illava.reducers import DivPrune


def slow_divprune(hidden, num_kept: int) -> list[int]:
    n = len(hidden)
    if n == 1:
        return [0]

    def distance(i: int, j: int) -> float:
        return 1 - torch.cosine_similarity(hidden[i], hidden[j], dim=0).item()

    picks = [max(range(n), key=lambda i: min(distance(i, j) for j in range(n) if j != i))]
    while len(picks) < num_kept:
        rest = [i for i in range(n) if i not in picks]
        picks.append(max(rest, key=lambda i: min(distance(i, p) for p in picks)))
    return sorted(picks)


@pytest.mark.parametrize("reducer", [DivPrune(keep_ratio=0.4), DivPrune(num_merged=2), DivPrune(keep_per_frame=1)])
@pytest.mark.parametrize("seed", [90, 91])
def test_picks_lie_far_apart(reducer, seed):
    tokens, evidence = ragged(seed)
    blocks = assign_each(reducer, tokens, evidence, "decoder_input")
    for block, (own_tokens, _) in zip(blocks, segments(tokens, evidence), strict=True):
        expected = slow_divprune(own_tokens.hidden_TD, reducer.num_kept(own_tokens.lengths[0]))
        assert kept_places(block) == expected

"""DivPrune against distances computed one by one."""

from __future__ import annotations

import math

import pytest
import torch

from illava.reducers import DivPrune, Evidence
from illava.tokens import Tokens
from tests.support.reducer_cases import assign_each, kept_places, ragged, segments

pytestmark = pytest.mark.numeric


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


def test_what_rounding_cannot_tell_apart_goes_to_the_earlier_token():
    """As of two tokens that are each other's nearest: kernels of other shapes round their one distance in two ways."""
    third, turn = math.pi / 3, 6e-7  # the last pair's distance is larger by 5e-7
    angle = torch.tensor([0.0, third, math.pi, math.pi + third + turn], dtype=torch.double)
    hidden_TD = torch.stack([angle.cos(), angle.sin()], 1).float()
    tokens = Tokens(hidden_TD, (4,), torch.zeros(4, 3, dtype=torch.long))
    assert DivPrune(keep_per_frame=1).assign(tokens, Evidence(), "decoder_input").kept_K.tolist() == [0]

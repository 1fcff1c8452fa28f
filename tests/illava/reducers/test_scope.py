"""SCOPE against its gain written out."""

from __future__ import annotations

import pytest
import torch

from illava.reducers import SCOPE
from tests.support.reducer_cases import assign_each, kept_places, ragged, segments

pytestmark = pytest.mark.numeric


def slow_scope(hidden, saliency, alpha: float, num_kept: int) -> list[int]:
    n = len(hidden)
    cosine = [[torch.cosine_similarity(hidden[i], hidden[j], dim=0).item() for j in range(n)] for i in range(n)]
    covered, picks = [0.0] * n, []
    for _ in range(num_kept):
        gain = {
            j: saliency[j].item() ** alpha * sum(max(0.0, cosine[i][j] - covered[i]) for i in range(n))
            for j in range(n)
            if j not in picks
        }
        picks.append(max(gain, key=gain.get))
        covered = [max(covered[i], cosine[i][picks[-1]]) for i in range(n)]
    return sorted(picks)


@pytest.mark.parametrize(
    "reducer",
    [SCOPE(keep_ratio=0.4), SCOPE(keep_ratio=0.3, alpha=3.0), SCOPE(keep_ratio=0.5, saliency="cls_attention")],
)
@pytest.mark.parametrize("seed", [100, 101])
def test_saliency_times_coverage(reducer, seed):
    tokens, evidence = ragged(seed)
    blocks = assign_each(reducer, tokens, evidence, "vision_output")
    for block, (own_tokens, own) in zip(blocks, segments(tokens, evidence), strict=True):
        saliency = getattr(own, f"{reducer.saliency}_T")
        num_kept = reducer.num_kept(own_tokens.lengths[0])
        assert kept_places(block) == slow_scope(own_tokens.hidden_TD, saliency, reducer.alpha, num_kept)

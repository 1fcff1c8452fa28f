"""VisionZip against loops."""

from __future__ import annotations

import pytest
import torch

from illava.reducers import VisionZip
from tests.support.closeness import assert_close
from tests.support.reducer_cases import assign_each, groups_matrix, ragged, segments

pytestmark = pytest.mark.numeric


def slow_visionzip(score, keys, num_kept: int, contextual_share: float) -> torch.Tensor:
    n = len(score)
    num_contextual = min(num_kept, max(1, round(num_kept * contextual_share)))
    ranking = sorted(range(n), key=lambda i: -score[i].item())
    dominant = set(ranking[: num_kept - num_contextual])
    others = [i for i in range(n) if i not in dominant]
    step = max(1, len(others) // num_contextual)
    targets = others[::step][:num_contextual]
    groups = {i: [i] for i in [*dominant, *targets]}
    metric = keys.mean(1)
    for i in others:
        if i not in targets:
            target = max(targets, key=lambda t: torch.cosine_similarity(metric[i], metric[t], dim=0).item())
            groups[target].append(i)
    return groups_matrix(groups, [1.0] * n, n)


@pytest.mark.parametrize(
    "reducer",
    [
        VisionZip(keep_ratio=0.5),
        VisionZip(num_merged=2, contextual_share=1.0),
        VisionZip(keep_ratio=0.3, contextual_share=0.4, saliency="cls_attention"),
    ],
)
def test_dominant_stay_and_the_rest_gather(reducer):
    tokens, evidence = ragged(80)
    blocks = assign_each(reducer, tokens, evidence, "vision_output")
    for block, (own_tokens, own) in zip(blocks, segments(tokens, evidence), strict=True):
        score = getattr(own, f"{reducer.saliency}_T")
        k = reducer.num_kept(own_tokens.lengths[0])
        assert_close(block, slow_visionzip(score, own.keys_THd, k, reducer.contextual_share))

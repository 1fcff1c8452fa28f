"""PruMerge against numpy's percentiles and a loop over centres."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from illava.reducers import PruMerge
from tests.support.closeness import assert_close
from tests.support.reducer_cases import assign_each, ragged, segments

pytestmark = pytest.mark.numeric


def slow_prumerge(score, keys, num_neighbours: int, *, plus: bool) -> torch.Tensor:
    n, values = len(score), score.numpy()
    lower, upper = np.percentile(values, 25), np.percentile(values, 75)
    centres = set(np.where(values > upper + 1.5 * (upper - lower))[0].tolist()) or {int(values.argmax())}
    if plus:
        stride = max(1, int(int(n / len(centres)) / 3))
        centres |= set(range(0, n, stride))
    matrix = torch.zeros(len(centres), n)
    for row, i in enumerate(sorted(centres)):
        cosine = {
            j: torch.cosine_similarity(keys[i].flatten(), keys[j].flatten(), dim=0).item() for j in range(n) if j != i
        }
        for j in sorted(cosine, key=lambda j: -cosine[j])[:num_neighbours]:
            matrix[row, j] = score[j]
        matrix[row, i] = 1
    return matrix


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("num_neighbours", [3, 32])
@pytest.mark.parametrize("saliency", ["attention_received", "cls_attention"])
def test_outliers_take_up_their_neighbours(plus, num_neighbours, saliency):
    tokens, evidence = ragged(70, ((2, 4, 5), (1, 3, 3), (1, 1, 1), (1, 7, 7), (1, 1, 2)))
    score_T = getattr(evidence, f"{saliency}_T")
    score_T.copy_(-score_T.log())  # a long tail: some beyond the fence, some close to it
    reducer = PruMerge(plus=plus, num_neighbours=num_neighbours, saliency=saliency)
    blocks = assign_each(reducer, tokens, evidence, "vision_output")
    for block, (_, own) in zip(blocks, segments(tokens, evidence), strict=True):
        own_score = getattr(own, f"{saliency}_T")
        assert_close(block, slow_prumerge(own_score, own.keys_THd, num_neighbours, plus=plus))
    assert max(len(block) for block in blocks) >= 2


def test_the_fence_is_one_and_a_half_ranges_above():
    tokens, evidence = ragged(72, ((1, 1, 9),))
    for last, num_centres in ((11.9, 1), (12.1, 2)):  # quartiles 2 and 6: the fence is at 12
        evidence.attention_received_T[:] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 20, last])
        assert PruMerge().assign(tokens, evidence, "vision_output").lengths == (num_centres,)


def test_plus_keeps_more():
    tokens, evidence = ragged(71)
    kept = [PruMerge(plus=plus).assign(tokens, evidence, "vision_output").num_kept for plus in (False, True)]
    assert kept[0] < kept[1]

"""EVS against a walk through the frames."""

from __future__ import annotations

import pytest
import torch

from illava.reducers import EVS
from tests.support.reducer_cases import assign_each, kept_places, ragged, segments

pytestmark = pytest.mark.numeric

SHAPES = ((4, 3, 4), (1, 3, 3), (6, 2, 2), (2, 5, 5))


def slow_novelty(hidden, places: list[list[int]]) -> list[float]:
    novelty = []
    for i, (frame, row, col) in enumerate(places):
        before = [j for j, p in enumerate(places) if p[1:] == [row, col] and p[0] < frame]
        if row < 0 or not before:
            novelty.append(float("inf"))
        else:
            j = max(before, key=lambda j: places[j][0])
            novelty.append(1 - torch.cosine_similarity(hidden[i], hidden[j], dim=0).item())
    return novelty


@pytest.mark.parametrize(("seed", "missing"), [(120, 0.0), (121, 0.3)])
@pytest.mark.parametrize("reducer", [EVS(keep_ratio=0.7), EVS(threshold=0.0), EVS(threshold=0.3)])
def test_what_the_frame_before_showed_goes(seed, missing, reducer):
    tokens, evidence = ragged(seed, SHAPES, missing=missing)
    tokens.coord_T3[-1] = torch.tensor([-1, -1, -1])  # a separator at the end of the last medium
    blocks = assign_each(reducer, tokens, evidence, "decoder_input")
    for block, (own, _) in zip(blocks, segments(tokens, evidence), strict=True):
        novelty = slow_novelty(own.hidden_TD, own.coord_T3.tolist())
        if reducer.threshold is not None:
            expected = [i for i, v in enumerate(novelty) if v > 1 - reducer.threshold]
        else:
            k = reducer.num_kept(len(novelty))
            expected = sorted(sorted(range(len(novelty)), key=lambda i: -novelty[i])[:k])
        assert kept_places(block) == expected


def test_a_still_video_keeps_its_first_frame():
    tokens, evidence = ragged(122, ((5, 3, 3),))
    tokens.hidden_TD[:] = tokens.hidden_TD[:9].repeat(5, 1)
    tokens.hidden_TD[9 * 3 + 4] *= -1  # something moves in frame 3, and is gone in frame 4
    kept = EVS(threshold=0.99).assign(tokens, evidence, "decoder_input").kept_K.tolist()
    assert kept == [*range(9), 9 * 3 + 4, 9 * 4 + 4]

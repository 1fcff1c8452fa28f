"""The 2026 revision against a loop over recycling tokens."""

from __future__ import annotations

import pytest
import torch

from illava.reducers import ILLaVA2026
from tests.support.closeness import assert_close
from tests.support.reducer_cases import assign_each, ragged, segments

pytestmark = pytest.mark.numeric


def slow_recycling(hidden, score, num_kept: int) -> torch.Tensor:
    n, dim = hidden.shape
    ranking = sorted(range(n), key=lambda i: -score[i].item())
    kept, redundant = sorted(ranking[:num_kept]), ranking[num_kept:]
    recycling = set(ranking[num_kept - max(1, round(0.05 * num_kept)) : num_kept]) if redundant else set()
    matrix = torch.zeros(num_kept, n)
    for row, i in enumerate(kept):
        matrix[row, i] = 0.5 if i in recycling else 1.0
        if i in recycling:
            dot = {j: (hidden[i] * hidden[j]).sum().item() for j in redundant}
            best = sorted(redundant, key=lambda j: -dot[j])[:5]
            weight = torch.softmax(torch.tensor([dot[j] for j in best]) / dim**0.5, 0) / 2
            for j, w in zip(best, weight, strict=True):
                matrix[row, j] = w
    return matrix


@pytest.mark.parametrize(
    ("reducer", "stage", "field"),
    [
        (ILLaVA2026(keep_ratio=0.5), "vision_block", "attention_received_T"),
        (ILLaVA2026(num_merged=2), "vision_block", "attention_received_T"),
        (ILLaVA2026(keep_per_frame=36), "decoder_input", "attention_received_T"),
        (ILLaVA2026(keep_ratio=0.85, score="released"), "decoder_layer", "last_query_attention_T"),
    ],
)
def test_recycling_tokens_take_up_redundant_ones(reducer, stage, field):
    tokens, evidence = ragged(130, ((2, 4, 5), (1, 3, 3), (1, 1, 1), (2, 7, 7)))
    blocks = assign_each(reducer, tokens, evidence, stage)
    for block, (own_tokens, own) in zip(blocks, segments(tokens, evidence), strict=True):
        num_kept = reducer.num_kept(own_tokens.lengths[0])
        assert_close(block, slow_recycling(own_tokens.hidden_TD, getattr(own, field), num_kept))
    mixed = [int((block.max(1).values < 0.75).sum()) for block in blocks]
    assert max(mixed) >= 2 or reducer.keep_ratio is None

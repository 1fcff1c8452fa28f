"""Tokens that look in one direction, as of a blank page or a still video: what is equal by the formula is a tie.

Their lengths differ, so their cosines are 1 but for the last bits, which kernels round as they like.
"""

from __future__ import annotations

import pytest
import torch

from illava.reducers import EVS, Evidence, Greedy, ToMe, VisionZip
from illava.tokens import Tokens
from tests.support.reducer_cases import assign_each

pytestmark = pytest.mark.numeric
NUM_TOKENS, WIDTH = 24, 48


def one_direction():
    gen = torch.Generator().manual_seed(1)
    length_T1 = torch.rand(NUM_TOKENS, 1, generator=gen) + 0.5
    value_TD = length_T1 * torch.randn(WIDTH, generator=gen)
    coord_T3 = torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(3))
    evidence = Evidence(
        keys_THd=value_TD[:, None],
        attention_received_T=torch.arange(NUM_TOKENS, 0.0, -1.0),
        size_T=torch.ones(NUM_TOKENS),
    )
    return Tokens(value_TD, (NUM_TOKENS,), coord_T3), evidence


@pytest.mark.parametrize(
    ("reducer", "stage", "groups"),
    [
        (ToMe(num_merged=4), "vision_block", [[0, 1, 2, 4, 6], *([n] for n in (3, 5, *range(7, 24)))]),
        (Greedy(num_merged=4), "vision_block", [[0, 1, 2, 3, 4], *([n] for n in range(5, 24))]),
        (
            VisionZip(num_merged=16, contextual_share=0.5),  # four dominant tokens; the first of four targets
            "vision_output",
            [*([n] for n in (0, 1, 2, 3, 9, 14, 19)), [n for n in range(4, 24) if n not in (9, 14, 19)]],
        ),
        (EVS(keep_ratio=0.5), "decoder_input", [[n] for n in range(12)]),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_ties_go_to_the_earlier_token(reducer, stage, groups):
    tokens, evidence = one_direction()
    (matrix_KT,) = assign_each(reducer, tokens, evidence, stage)
    found = sorted(row.nonzero().flatten().tolist() for row in matrix_KT)
    assert found == sorted(groups)

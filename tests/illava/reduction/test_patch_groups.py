"""Whole groups: what a reducer sees of them, and its decision spread over their patches."""

import pytest
import torch

from illava.reducers import REDUCERS, AttentionPruning, Evidence, ILLaVA, ILLaVA2026, ToMe
from illava.reduction.patch_groups import group_evidence, group_tokens, spread
from illava.tokens import Tokens, gather_kept, merge
from tests.support.closeness import assert_close

pytestmark = pytest.mark.numeric

# 3 x 2 groups and 2 x 2 groups of 2 x 2 patches
LENGTHS = (24, 16)


def patches():
    rng = torch.Generator().manual_seed(3)
    place = []
    for frame, (rows, cols) in enumerate([(3, 2), (2, 2)]):
        for row in range(rows):
            for col in range(cols):
                place += [[frame, 2 * row + i, 2 * col + j] for i in (0, 1) for j in (0, 1)]
    tokens = Tokens(torch.randn(40, 5, generator=rng), LENGTHS, torch.tensor(place))
    evidence = Evidence(
        attention_received_T=torch.rand(40, generator=rng), keys_THd=torch.randn(40, 2, 3, generator=rng)
    )
    return tokens, evidence


def test_a_group_is_its_patches_side_by_side():
    tokens, evidence = patches()
    groups, measured = group_tokens(tokens, 2), group_evidence(evidence, 2)
    assert groups.lengths == (6, 4)
    assert groups.coord_T3.tolist() == [
        *([0, row, col] for row in range(3) for col in range(2)),
        *([1, row, col] for row in range(2) for col in range(2)),
    ]
    for group in range(10):
        own = range(4 * group, 4 * group + 4)
        assert torch.equal(groups.hidden_TD[group], torch.cat([tokens.hidden_TD[n] for n in own]))
        mean = sum(evidence.attention_received_T[n] for n in own) / 4
        assert_close(measured.attention_received_T[group], mean)
        for head in range(2):
            assert torch.equal(measured.keys_THd[group, head], torch.cat([evidence.keys_THd[n, head] for n in own]))


@pytest.mark.parametrize(
    "reducer",
    [
        ILLaVA(keep_ratio=0.5),
        ILLaVA(num_merged=3),
        ILLaVA2026(keep_ratio=0.5),
        AttentionPruning(keep_ratio=0.5),
        ToMe(num_merged=2),
    ],
    ids=lambda reducer: reducer.kind,
)
def test_patches_follow_their_group_corner_by_corner(reducer):
    assert reducer.kind in REDUCERS
    tokens, evidence = patches()
    of_groups = reducer.assign(group_tokens(tokens, 2), group_evidence(evidence, 2), "vision_block")
    of_patches = spread(of_groups, 2)
    assert of_patches.lengths == tuple(4 * n for n in of_groups.lengths)
    corners = torch.kron(of_groups.matrix().to_dense(), torch.eye(4))
    assert_close(of_patches.matrix().to_dense(), corners)
    merged = merge(of_patches, tokens.hidden_TD)
    assert_close(merged.view(-1, 20), merge(of_groups, tokens.hidden_TD.view(-1, 20)))
    place = gather_kept(of_patches, tokens.coord_T3).view(-1, 4, 3)
    assert ((place[:, :, 1:] // 2) == (place[:, :1, 1:] // 2)).all()


def test_groups_of_one_are_the_patches_themselves():
    tokens, evidence = patches()
    assert group_tokens(tokens, 1) is tokens
    assert group_evidence(evidence, 1) is evidence

"""The arithmetic of assignments against dense matrices."""

from __future__ import annotations

import pytest
import torch

from illava.tokens import Assignment, compose, embed_in_batch, gather_kept, identity, merge, pad, prune, ragged_index
from tests.support.closeness import assert_close

pytestmark = pytest.mark.numeric

LENGTHS_BEFORE, LENGTHS = (5, 4), (3, 3)


def _mixed(*, group_size: int | None = None) -> Assignment:
    """9 tokens -> 6: row 1 mixes 3 tokens, row 4 mixes 2 that row 1 shares one of."""
    return Assignment(
        num_tokens=9,
        lengths=LENGTHS,
        kept_K=torch.tensor([0, 2, 4, 5, 7, 8]),
        source_E=torch.tensor([1, 2, 3, 3, 7]),
        weight_E=torch.tensor([0.5, 0.3, 0.2, 0.9, 0.1]),
        target_G=torch.tensor([1, 4]),
        size_G=torch.tensor([3, 2]),
        group_size=group_size,
    )


def _dense() -> torch.Tensor:
    matrix = torch.zeros(6, 9)
    for row, col in enumerate([0, None, 4, 5, None, 8]):
        if col is not None:
            matrix[row, col] = 1
    matrix[1, 1:4] = torch.tensor([0.5, 0.3, 0.2])
    matrix[4, 3], matrix[4, 7] = 0.9, 0.1
    return matrix


def test_matrix_holds_copies_and_mixtures():
    assert torch.equal(_mixed().matrix().to_dense(), _dense())


def test_merge_is_the_product_with_the_matrix():
    hidden = torch.randn(9, 4)
    assert_close(merge(_mixed(), hidden), _dense() @ hidden)


def test_merge_in_equal_groups_is_the_product_with_the_matrix():
    hidden = torch.randn(6, 4)
    assignment = Assignment(
        num_tokens=6,
        lengths=(2, 2),
        kept_K=torch.tensor([0, 2, 3, 5]),
        source_E=torch.tensor([1, 2, 5, 4]),
        weight_E=torch.tensor([0.75, 0.25, 0.4, 0.6]),
        target_G=torch.tensor([1, 3]),
        size_G=torch.tensor([2, 2]),
        group_size=2,
    )
    assert_close(merge(assignment, hidden), assignment.matrix().to_dense() @ hidden)


def test_merge_sums_low_precision_in_float32_and_returns_the_input_dtype():
    hidden = torch.randn(9, 4).bfloat16()
    merged = merge(_mixed(), hidden)
    assert merged.dtype == torch.bfloat16
    assert_close(merged, _dense() @ hidden.float(), tolerance=2**-8)  # rounded once, at the end


def test_carry_gives_a_mixture_the_value_of_its_own_place():
    assert gather_kept(_mixed(), torch.arange(9) * 10).tolist() == [0, 20, 40, 50, 70, 80]


def test_identity_and_prune():
    hidden = torch.randn(9, 4)
    assert torch.equal(merge(identity(LENGTHS_BEFORE), hidden), hidden)
    kept = torch.tensor([1, 3, 8])
    assert torch.equal(merge(prune(kept, (2, 1), 9), hidden), hidden[kept])
    assert torch.equal(prune(kept, (2, 1), 9).matrix().to_dense(), torch.eye(9)[kept])


def test_compose_chains_two_steps():
    first, then = _mixed(), prune(torch.tensor([1, 4, 5]), (1, 2), 6)
    hidden = torch.randn(9, 4)
    both = compose(first.matrix(), then.matrix())
    assert_close(both.to_dense() @ hidden, merge(then, merge(first, hidden)))


def test_lift_leaves_other_tokens_alone():
    index = torch.tensor([1, 2, 4, 5, 6, 8, 9, 10, 11])  # of 14 tokens; 0, 3, 7, 12, 13 are text
    whole = embed_in_batch(_mixed(), index, 14, (6, 5))
    dense = torch.eye(14)[[0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13]]
    dense[[1, 2, 4, 6, 8, 7]] = 0
    kept = whole.kept_K.tolist()
    assert kept == sorted({0, 3, 7, 12, 13} | {int(index[k]) for k in _mixed().kept_K})
    expected = torch.zeros(11, 14)
    for row, token in enumerate(kept):
        if token in (0, 3, 7, 12, 13):
            expected[row, token] = 1
        else:
            inner = _mixed().kept_K.tolist().index(index.tolist().index(token))
            expected[row, index] = _dense()[inner]
    assert torch.equal(whole.matrix().to_dense(), expected)
    hidden = torch.randn(14, 3)
    assert_close(merge(whole, hidden), expected @ hidden)


@pytest.mark.parametrize("lengths", [(3, 3), (2, 4, 1), (0, 3), ()])
def test_pad_and_its_inverse(lengths):
    value = torch.arange(float(sum(lengths)))
    padded = pad(value, lengths, -1.0)
    width = max(lengths, default=0)
    assert padded.shape == (len(lengths), width)
    assert torch.equal(padded.flatten()[ragged_index(lengths, width, value.device)], value)
    assert int((padded == -1).sum()) == width * len(lengths) - sum(lengths)

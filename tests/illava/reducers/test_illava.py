"""`merge_least` against a slow version that handles one segment and one token at a time."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from illava.plan import preset
from illava.reducers import Evidence, ILLaVA
from illava.reducers.illava import merge_least
from illava.tokens import Tokens, merge
from tests.support.closeness import assert_close

pytestmark = pytest.mark.numeric


def _slow(score: list[float], hidden: torch.Tensor, num_removed: int) -> tuple[torch.Tensor, list[int]]:
    """One segment, straight from the definition: the merged hidden states and the places that remain."""
    if num_removed == 0:
        return hidden, list(range(len(score)))
    ascending = sorted(range(len(score)), key=lambda j: (score[j], j))
    merged = ascending[: num_removed + 1]
    total = (num_removed + 1) * (num_removed + 2) / 2
    new = sum((num_removed + 1 - m) / total * hidden[j].double() for m, j in enumerate(merged))
    places = sorted(set(range(len(score))) - set(merged[:-1]))
    out = [new if j == merged[-1] else hidden[j].double() for j in places]
    return torch.stack(out).float(), places


def _check(score: torch.Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> None:
    hidden = torch.randn(sum(lengths), 5)
    assignment = merge_least(score, lengths, kept)
    expected, places, start = [], [], 0
    for n, k in zip(lengths, kept, strict=True):
        part, where = _slow(score[start : start + n].tolist(), hidden[start : start + n], n - k)
        expected.append(part)
        places += [start + j for j in where]
        start += n
    assert assignment.kept_K.tolist() == places
    assert assignment.lengths == kept
    assert_close(merge(assignment, hidden), torch.cat(expected))
    matrix = assignment.matrix().to_dense()
    assert_close(matrix @ hidden, torch.cat(expected))
    assert_close(matrix.sum(1), torch.ones(sum(kept)))


def test_worked_case_of_the_method():
    score = torch.tensor([0.30, 0.10, 0.20, 0.05, 0.35])
    x = torch.eye(5)
    assignment = merge_least(score, (5,), (3,))
    expected = torch.stack([x[0], (3 * x[3] + 2 * x[1] + x[2]) / 6, x[4]])
    assert_close(merge(assignment, x), expected)
    assert assignment.kept_K.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ((8,), (5,)),
        ((6, 6, 6), (4, 4, 4)),
        ((9, 4, 12, 1), (5, 4, 1, 1)),
        ((7, 3), (7, 3)),
        ((5, 0, 5), (2, 0, 3)),
        ((729, 729), (637, 637)),
    ],
)
def test_equals_the_slow_version(lengths, kept):
    torch.manual_seed(0)
    _check(torch.rand(sum(lengths)), lengths, kept)


def test_equals_the_slow_version_on_random_ragged_segments_with_ties():
    draw = torch.Generator().manual_seed(1)
    for _ in range(60):
        lengths = tuple(int(n) for n in torch.randint(1, 15, (4,), generator=draw))
        kept = tuple(int(torch.randint(1, n + 1, (1,), generator=draw)) for n in lengths)
        _check(torch.randint(0, 4, (sum(lengths),), generator=draw) / 4, lengths, kept)


def test_ties_go_to_the_earlier_token():
    assert merge_least(torch.zeros(6), (6,), (4,)).kept_K.tolist() == [2, 3, 4, 5]


def test_budgets():
    assert ILLaVA(num_merged=92).num_kept(729) == 637
    assert ILLaVA(keep_ratio=0.7).num_kept(361) == 253
    assert ILLaVA(keep_per_frame=100).num_kept(196) == 100
    assert ILLaVA(keep_per_frame=100).num_kept(80) == 80
    assert ILLaVA(keep_per_frame=100).per == "frame"
    assert ILLaVA(num_merged=50).num_kept(20) == 1


def test_each_score_variant_uses_its_own_evidence():
    tokens = Tokens(torch.zeros(4, 1), (4,), torch.zeros(4, 3, dtype=torch.long))
    evidence = Evidence(
        attention_received_T=torch.tensor([0.0, 0.1, 2.0, 3.0]),
        causal_normalised_attention_T=torch.tensor([0.1, 2.0, 0.0, 3.0]),
        last_query_attention_T=torch.tensor([2.0, 3.0, 0.0, 0.1]),
    )
    kept = {
        score: ILLaVA(score=score, num_merged=1).assign(tokens, evidence, "decoder_layer").kept_K.tolist()
        for score in ("paper", "causal_normalised", "released")
    }
    assert kept == {"paper": [1, 2, 3], "causal_normalised": [0, 1, 3], "released": [0, 1, 3]}
    in_tower = ILLaVA(score="released", num_merged=1).assign(tokens, evidence, "vision_block")
    assert in_tower.kept_K.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "fields", [{}, {"num_merged": 3, "keep_ratio": 0.5}, {"keep_ratio": 1.0}, {"keep_per_frame": 9, "per": "medium"}]
)
def test_budgets_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValidationError):
        ILLaVA(**fields)


def test_presets_leave_the_published_counts():
    for name, left in {"illava-paper": 361, "illava-image": 361, "illava-video": 361, "illava-draw": 169}.items():
        plan, count = preset(name), 729
        for layer in plan.layers("vision_block"):
            count = plan.at("vision_block", layer).num_kept(count)
        assert count == left, name

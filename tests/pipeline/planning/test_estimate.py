"""Totals from stratified samples: worked examples, bounds, and how often the interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.planning.estimate import allocate, draw, estimate_total


def test_a_total_worked_out_by_hand() -> None:
    # Two strata: 10 members, sampled 1, 3; 4 members, sampled whole. Variance 100 * 0.8 * 2 / 2 = 80, one degree.
    found = estimate_total([10, 4], [[1.0, 3.0], [5.0, 5.0, 6.0, 8.0]])
    assert found.total == pytest.approx(20 + 24)
    assert found.high - found.total == pytest.approx(12.7062 * 80**0.5)
    assert found.low == pytest.approx(4 + 24)  # what was seen is spent


def test_degrees_of_freedom_are_satterthwaites() -> None:
    # Variances 100 * 0.8 * 2 / 2 = 80 and 400 * 0.9 * 2 / 2 = 360, one degree each: 440^2 / (80^2 + 360^2) = 1.4235.
    found = estimate_total([10, 20], [[1.0, 3.0], [5.0, 7.0]])
    assert found.high - found.total == pytest.approx(6.4908 * 440**0.5, rel=1e-4)


def test_a_whole_population_is_no_estimate() -> None:
    found = estimate_total([2, 1], [[1.0, 2.0], [4.0]])
    assert (found.low, found.total, found.high) == (7.0, 7.0, 7.0)


def test_draws_cover_each_stratum_twice_and_then_in_proportion() -> None:
    assert allocate([100, 50, 1], 16) == [10, 5, 1]
    assert allocate([100, 3, 3], 8) == [4, 2, 2]
    assert allocate([3, 2], 16) == [3, 2]
    with pytest.raises(ValueError, match="4 strata need 8 draws; 6 were allowed"):
        allocate([9, 9, 9, 9], 6)


def test_draws_are_distinct_members_and_the_seed_decides_them() -> None:
    strata = [list(range(0, 90, 3)), list(range(1, 90, 3))]
    first = draw(strata, 16, seed=3)
    assert first == draw(strata, 16, seed=3) != draw(strata, 16, seed=4)
    for stratum, places in zip(strata, first, strict=True):
        assert len(set(places)) == len(places) == 8
        assert set(places) <= set(stratum)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    videos, images = rng.gamma(4.0, 1.0, 150), rng.gamma(9.0, 0.02, 90)
    strata = [list(range(150)), list(range(150, 240))]
    values, inside = np.concatenate([videos, images]), 0
    for seed in range(400):
        samples = [values[places].tolist() for places in draw(strata, 16, seed=seed)]
        found = estimate_total([150, 90], samples)
        inside += found.low <= values.sum() <= found.high
    assert 0.90 <= inside / 400 <= 0.99


def test_any_seed_draws():
    strata = [range(10), range(20, 40)]
    assert draw(strata, 8, seed=-1) == draw(strata, 8, seed=-1) != draw(strata, 8, seed=1)

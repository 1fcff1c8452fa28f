"""Intervals: exact where they must be, honest in simulations."""

import numpy as np
import pytest

from pipeline.evaluation.statistics import mcnemar, mean_interval, median_interval, paired_difference


def test_the_mean_and_its_counts():
    interval = mean_interval([0, 1, 1, 1], ["a", "a", "b", "c"])
    assert (interval.mean, interval.num_values, interval.num_clusters) == (0.75, 4, 3)
    assert 0 <= interval.low <= 0.75 <= interval.high <= 1


def test_the_same_seed_gives_the_same_interval():
    values, clusters = np.random.default_rng(3).normal(size=50), np.arange(50) // 5
    assert mean_interval(values, clusters, seed=1) == mean_interval(values, clusters, seed=1)
    assert mean_interval(values, clusters, seed=1) != mean_interval(values, clusters, seed=2)


def test_draws_in_several_pieces_keep_the_interval(monkeypatch):
    values, clusters = np.random.default_rng(3).normal(size=50), np.arange(50)
    whole = mean_interval(values, clusters)
    monkeypatch.setattr("pipeline.evaluation.statistics._DRAWS_AT_ONCE", 1000)
    assert mean_interval(values, clusters) == whole


def test_equal_values_have_no_width():
    interval = mean_interval([0.1] * 7, list("aabbccd"))
    assert (interval.mean, interval.low, interval.high) == (0.1, 0.1, 0.1)


def test_intervals_are_those_that_were_published():
    """Ends as own bootstraps of earlier versions had them (numpy, 2,000 draws; random.choices, 10,000)."""
    generator = np.random.default_rng(0)
    before = (generator.random(800) < 0.9).astype(float)
    after = before * (generator.random(800) < 0.8)
    samples = np.arange(800) // 2
    mean, change = mean_interval(after, samples), paired_difference(before, after, samples)
    assert (mean.low, mean.mean, mean.high) == pytest.approx((0.66875, 0.7, 0.73125), abs=0.002)
    assert (change.low, change.mean, change.high) == pytest.approx((-0.22003125, -0.19375, -0.16625), abs=0.002)
    ratios = [1.01, 1.06, 0.99, 1.03, 1.02, 1.05, 1.0, 1.04, 0.97]
    assert median_interval(ratios) == pytest.approx((0.99, 1.05), abs=0.01)


def test_a_single_medium_has_no_width():
    interval = mean_interval([0, 1, 1], ["a", "a", "a"])
    assert interval.mean == interval.low == interval.high == pytest.approx(2 / 3)


def test_many_questions_on_few_media_widen_the_interval():
    generator = np.random.default_rng(0)
    of_visual = generator.normal(size=20)
    values = np.repeat(of_visual, 10)
    clustered = mean_interval(values, np.repeat(np.arange(20), 10))
    naive = mean_interval(values, np.arange(200))
    assert clustered.high - clustered.low > 2.5 * (naive.high - naive.low)  # the square root of ten, about


def test_the_interval_holds_the_mean_as_often_as_it_says():
    held = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        clusters = np.repeat(np.arange(80), 3)
        values = 0.3 + generator.normal(size=80)[clusters] + generator.normal(size=240)
        interval = mean_interval(values, clusters, num_resamples=500, seed=seed)
        held += interval.low <= 0.3 <= interval.high
    assert 182 <= held <= 199  # 95 % of 200, give or take 2.5 standard deviations


def test_a_difference_with_itself_is_exactly_zero():
    values = np.random.default_rng(0).normal(size=99)
    interval = paired_difference(values, values, np.arange(99) // 3)
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_a_paired_difference_is_second_minus_first():
    assert paired_difference([1, 2], [2, 5], ["a", "b"]).mean == 2.0


def test_pairing_removes_what_both_share():
    generator = np.random.default_rng(1)
    shared = generator.normal(scale=10, size=100)
    paired = paired_difference(shared, shared + 0.1, np.arange(100))
    assert paired.low == pytest.approx(0.1) == paired.high


def test_mcnemar_by_hand():
    # 10 and 3 differ: 2 * (C(13,0) + C(13,1) + C(13,2) + C(13,3)) / 2^13 = 2 * 378 / 8192
    test = mcnemar([1] * 10 + [0] * 3 + [1] * 5, [0] * 10 + [1] * 3 + [1] * 5)
    assert (test.only_first, test.only_second) == (10, 3)
    assert test.p_value == pytest.approx(2 * 378 / 8192)


def test_mcnemar_without_a_difference():
    assert mcnemar([1, 0], [1, 0]).p_value == 1.0
    assert mcnemar([1, 0], [0, 1]).p_value == 1.0


def test_mcnemar_with_many_pairs():
    # scipy.stats.binomtest(480, 1000).pvalue
    test = mcnemar([1] * 480 + [0] * 520, [0] * 480 + [1] * 520)
    assert test.p_value == pytest.approx(0.2174482932)


@pytest.mark.parametrize(
    ("values", "clusters"), [([], []), ([1.0], []), ([1.0, float("nan")], ["a", "b"])], ids=["none", "lengths", "nan"]
)
def test_what_has_no_interval_is_refused(values, clusters):
    with pytest.raises(ValueError, match=r"interval needs|not finite"):
        mean_interval(values, clusters)


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="needs pairs"):
        paired_difference([1], [1, 2], ["a"])
    with pytest.raises(ValueError, match="needs pairs"):
        mcnemar([1], [1, 0])


def test_a_median_of_one_value_has_no_width_and_of_none_is_refused():
    assert median_interval([1.5]) == (1.5, 1.5)
    with pytest.raises(ValueError, match="needs values"):
        median_interval([])

"""Intervals and tests on scores: bootstrap clustered by medium, paired differences, McNemar. numpy only.

Questions on one medium are not independent: media are drawn, all questions of a drawn medium come with it. Everything
is deterministic for a seed and vectorised. Knows nothing of rows or runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
_DRAWS_AT_ONCE = 2_000_000  # 16 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where it lies.

    Attributes:
        mean: of the values.
        low, high: ends of the interval; equal to the mean where there is a single cluster or nothing varies.
        num_values: how many values.
        num_clusters: how many media they come from.
    """

    mean: float
    low: float
    high: float
    num_values: int
    num_clusters: int


@dataclass(frozen=True, slots=True)
class McNemar:
    """A paired test of two runs that are right or wrong on the same questions.

    Attributes:
        only_first: questions only the first run has right.
        only_second: questions only the second run has right.
        p_value: exact, two-sided; 1 where the runs never differ.
    """

    only_first: int
    only_second: int
    p_value: float


def mean_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[str] | np.ndarray,
    *,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean, media drawn with replacement.

    Args:
        values: one for each question, finite.
        clusters: which medium each belongs to.
        level: how often the interval should hold the true mean.
        num_resamples: sets of media drawn.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: no values, lengths that differ, or a value that is not finite.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile interval); Field and Welsh 2007 (drawing clusters). The
        mean of a draw is its sum over its count, since media differ in their number of questions.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array) or len(array) != len(clusters):
        raise ValueError(f"an interval needs values, each with its cluster; got {len(array)} and {len(clusters)}")
    if not np.isfinite(array).all():
        raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(array))[0])} is not finite")
    _, which = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(which).astype(np.float64)
    if (array == array[0]).all():  # exactly this value, without a rounding error
        mean = float(array[0])
        return Interval(mean, mean, mean, len(array), len(counts))
    sums = np.bincount(which, weights=array)
    low, high = np.quantile(_drawn_means(sums, counts, num_resamples, seed), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high), len(array), len(counts))


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[str] | np.ndarray,
    *,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of ``second - first`` on the same questions; exactly zero for equal values.

    Raises:
        ValueError: as `mean_interval`.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired difference needs pairs; got {len(a)} and {len(b)} values")
    return mean_interval(b - a, clusters, level=level, num_resamples=num_resamples, seed=seed)


def mcnemar(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> McNemar:
    """Exact McNemar test; a value above one half counts as right.

    Questions count as independent: where many share a medium, trust the clustered interval of the difference instead.

    Raises:
        ValueError: lengths that differ.

    Source: McNemar 1947; the exact form is a two-sided binomial test of the pairs that differ.
    """
    a, b = np.asarray(first, dtype=np.float64) > 0.5, np.asarray(second, dtype=np.float64) > 0.5
    if a.shape != b.shape:
        raise ValueError(f"McNemar's test needs pairs; got {len(a)} and {len(b)} values")
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    return McNemar(only_first, only_second, _binomial_two_sided(min(only_first, only_second), only_first + only_second))


def _drawn_means(sums: np.ndarray, counts: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    num_clusters = len(counts)
    at_once = max(1, _DRAWS_AT_ONCE // num_clusters)
    means = []
    for start in range(0, num_resamples, at_once):
        drawn_RC = generator.integers(0, num_clusters, size=(min(at_once, num_resamples - start), num_clusters))
        means.append(sums[drawn_RC].sum(axis=1) / counts[drawn_RC].sum(axis=1))
    return np.concatenate(means)


def _binomial_two_sided(fewer: int, total: int) -> float:
    """Twice the chance of at most ``fewer`` heads in ``total`` fair throws, at most 1."""
    if total == 0:
        return 1.0
    logs = np.log(np.arange(1, total + 1))
    log_factorial = np.concatenate([[0.0], np.cumsum(logs)])
    heads = np.arange(fewer + 1)
    terms = log_factorial[total] - log_factorial[heads] - log_factorial[total - heads] - total * math.log(2)
    return min(1.0, 2.0 * float(np.exp(terms).sum()))

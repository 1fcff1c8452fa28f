"""Computes intervals and tests on scores: bootstrap clustered by medium, paired differences, McNemar.

Questions about one image or video are not independent. So media are drawn, and all questions of a drawn one come with
it. Everything is deterministic for a seed. Importing this takes a second and 60 MB, so commands import it when they
need it, and a sweep before its first point, whose memory would be the smaller for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

NUM_RESAMPLES = 2000
_DRAWS_AT_ONCE = 2_000_000  # 16 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """Holds a mean and where it lies.

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
    """Holds a paired test of two runs that are right or wrong on the same questions.

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
    """Return the percentile interval of the mean, media drawn with replacement.

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
    mean = float(sums.sum() / counts.sum())
    low, high = mean, mean
    if len(counts) > 1:
        low, high = _percentile_interval((sums, counts), _ratio_of_sums, level, num_resamples, seed)
    return Interval(mean, low, high, len(array), len(counts))


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[str] | np.ndarray,
    *,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the interval of the mean of ``second - first`` on the same questions; exactly zero for equal values.

    Raises:
        ValueError: as `mean_interval`.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired difference needs pairs; got {len(a)} and {len(b)} values")
    return mean_interval(b - a, clusters, level=level, num_resamples=num_resamples, seed=seed)


def median_interval(
    values: Sequence[float] | np.ndarray, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of the median of independent values; a single value is both ends.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise ValueError("a median needs values")
    if len(array) == 1:
        return float(array[0]), float(array[0])
    return _percentile_interval((array,), np.median, level, num_resamples, seed)


def mcnemar(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> McNemar:
    """Run the exact McNemar test; a value above one half counts as right.

    Questions count as independent: where many share a medium, trust the clustered interval of the difference instead.

    Raises:
        ValueError: lengths that differ.

    Source: McNemar 1947; the exact form is a two-sided binomial test of the pairs that differ.
    """
    a, b = np.asarray(first, dtype=np.float64) > 0.5, np.asarray(second, dtype=np.float64) > 0.5
    if a.shape != b.shape:
        raise ValueError(f"McNemar's test needs pairs; got {len(a)} and {len(b)} values")
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    if not only_first + only_second:
        return McNemar(0, 0, 1.0)
    return McNemar(only_first, only_second, float(binomtest(only_first, only_first + only_second).pvalue))


def _ratio_of_sums(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis) / counts.sum(axis)


def _percentile_interval(
    data: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], level: float, num_resamples: int, seed: int
) -> tuple[float, float]:
    """Ends of the bootstrap interval of a statistic; the arrays of ``data`` are drawn together."""
    found = bootstrap(
        data,
        statistic,
        paired=len(data) > 1,
        vectorized=True,
        n_resamples=num_resamples,
        batch=max(1, _DRAWS_AT_ONCE // len(data[0])),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)

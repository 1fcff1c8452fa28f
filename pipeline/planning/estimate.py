"""Estimates a total from a stratified sample, with a 95 % interval. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """Holds a total and where it lies, with 95 % confidence."""

    total: float
    low: float
    high: float


def allocate(sizes: Sequence[int], num_draws: int) -> list[int]:
    """Allot draws to each stratum: two where it has two, so that its spread shows; the rest in proportion to the sizes.

    Raises:
        ValueError: fewer draws than that needs.
    """
    draws = [min(size, 2) for size in sizes]
    if sum(draws) > num_draws:
        raise ValueError(f"{len(sizes)} strata need {sum(draws)} draws; {num_draws} were allowed")
    while sum(draws) < min(num_draws, sum(sizes)):
        open_strata = [stratum for stratum, size in enumerate(sizes) if draws[stratum] < size]
        draws[max(open_strata, key=lambda stratum: sizes[stratum] / draws[stratum])] += 1
    return draws


def draw(strata: Sequence[Sequence[int]], num_draws: int, *, seed: int) -> list[list[int]]:
    """Draw places from each stratum without replacement, ascending; as `allocate` raises."""
    rng = np.random.default_rng(seed % 2**64)  # a negative one is none to numpy
    counts = allocate([len(stratum) for stratum in strata], num_draws)
    return [
        sorted(rng.choice(np.asarray(stratum), count, replace=False).tolist())
        for stratum, count in zip(strata, counts, strict=True)
    ]


def estimate_total(sizes: Sequence[int], samples: Sequence[Sequence[float]]) -> Estimate:
    """Estimate the total over a finite population, from samples of its strata drawn without replacement.

    ``sum_h N_h mean_h``, with variance ``sum_h N_h^2 (1 - n_h / N_h) s_h^2 / n_h`` and Satterthwaite's degrees of
    freedom (Cochran, Sampling Techniques, 3rd edition, sections 5.3 and 5.4). The lower end is at least what the sample
    itself came to.

    Args:
        sizes: members of each stratum.
        samples: non-negative values of the drawn members; two or more, or all.
    """
    total = math.fsum(size * fmean(sample) for size, sample in zip(sizes, samples, strict=True))
    parts = []
    for size, sample in zip(sizes, samples, strict=True):
        if len(sample) < size:
            num = len(sample)
            parts.append((size**2 * (1 - num / size) * variance(sample) / num, num - 1))
    spread = math.fsum(part for part, _ in parts)
    if spread == 0:
        return Estimate(total, total, total)
    from scipy.stats import t as student_t  # takes a second; most plans are not probed

    freedom = spread**2 / math.fsum(part**2 / degrees for part, degrees in parts)
    half = float(student_t.ppf(0.975, freedom)) * math.sqrt(spread)
    seen = math.fsum(math.fsum(sample) for sample in samples)
    return Estimate(total, max(total - half, seen), total + half)

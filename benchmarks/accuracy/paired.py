"""Paired comparison of two sets of right-or-wrong answers, resampling whole samples. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Comparison:
    """One plan against the reference on the same questions.

    Attributes:
        num_questions: questions compared.
        accuracy, low, high: the plan's exact match and its 95 % interval.
        difference, difference_low, difference_high: plan minus reference, and its 95 % interval.
        lost: right before, wrong now.
        won: wrong before, right now.
    """

    num_questions: int
    accuracy: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    lost: int
    won: int

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, rounded to four places."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def compare(
    sample_ids: Sequence[str],
    reference: Sequence[bool],
    found: Sequence[bool],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Cluster bootstrap over samples.

    Args:
        sample_ids: the sample of each question; questions of one sample move together.
        reference: whether the reference answered each question exactly.
        found: the same for the plan.
        num_resamples: bootstrap draws.
        seed: of the draws.
    """
    before, after = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    _, cluster = np.unique(np.asarray(sample_ids), return_inverse=True)
    num_clusters = int(cluster.max()) + 1
    sums = np.stack([np.bincount(cluster, weights, num_clusters) for weights in (np.ones_like(after), before, after)])
    rng = np.random.default_rng(seed)
    drawn = np.stack([sums[:, rng.integers(num_clusters, size=num_clusters)].sum(1) for _ in range(num_resamples)])
    low, high = np.percentile(drawn[:, 2] / drawn[:, 0], [2.5, 97.5])
    change_low, change_high = np.percentile((drawn[:, 2] - drawn[:, 1]) / drawn[:, 0], [2.5, 97.5])
    return Comparison(
        num_questions=len(after),
        accuracy=float(after.mean()),
        low=float(low),
        high=float(high),
        difference=float((after - before).mean()),
        difference_low=float(change_low),
        difference_high=float(change_high),
        lost=int(((before == 1) & (after == 0)).sum()),
        won=int(((before == 0) & (after == 1)).sum()),
    )

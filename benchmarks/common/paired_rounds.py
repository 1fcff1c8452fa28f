"""Sides of a comparison by turns, round by round, and what the rounds' ratios let one say.

A shared machine drifts by more than the sides differ, so each round has every side once, every other round in reverse
order, and only seconds of one round are divided. Knows nothing of what is measured; writes nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pipeline.evaluation.statistics import median_interval

PAIRS = {"empty_vs_stock": ("stock", "empty"), "plan_vs_stock": ("stock", "plan"), "plan_vs_empty": ("empty", "plan")}
_FEWEST_ROUNDS = 5  # of fewer, a resampled median is hardly ever another than the range's ends
_Seen = TypeVar("_Seen")


def by_turns(sides: Mapping[str, Callable[[], _Seen]], num_rounds: int) -> dict[str, list[_Seen]]:
    """What each side gave, round by round: A B C, C B A, A B C, ..."""
    seen: dict[str, list[_Seen]] = {name: [] for name in sides}
    for number in range(num_rounds):
        for name in sides if number % 2 == 0 else reversed(list(sides)):
            seen[name].append(sides[name]())
    return seen


def compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """For each pair of sides the slower name's seconds over the faster's, by round; see `spread`."""
    return {
        name: spread([a / b for a, b in zip(seconds[slower], seconds[faster], strict=True)])
        for name, (slower, faster) in PAIRS.items()
    }


def spread(ratios: Sequence[float]) -> dict[str, Any]:
    """Median and range of the rounds' ratios, the median's 95 % interval by resampling rounds, and a verdict by it.

    The resampling draws from a seed of its own: equal ratios give equal intervals.
    """
    low, high = median_interval(ratios)
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference seen"
    if len(ratios) < _FEWEST_ROUNDS:
        verdict = "too few rounds to say"
    ends = {"min": min(ratios), "max": max(ratios), "low": low, "high": high}
    return {"median": statistics.median(ratios), **ends, "verdict": verdict, "rounds": [round(r, 4) for r in ratios]}

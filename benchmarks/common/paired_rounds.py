"""Sides of a comparison by turns, round by round, and what the rounds' ratios let one say.

A shared machine drifts by more than the sides differ, so each round has every side once, every other round in reverse
order, and only seconds of one round are divided. Rounds that something else disturbed are refused, and measured again
as long as there are tries. Knows nothing of what is measured; writes nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pipeline.evaluation.statistics import median_interval

PAIRS = {"empty_vs_stock": ("stock", "empty"), "plan_vs_stock": ("stock", "plan"), "plan_vs_empty": ("empty", "plan")}
_FEWEST_ROUNDS = 5  # of fewer, a resampled median is hardly ever another than the range's ends
MAX_SCATTER = 1.1  # of a side's seconds over its fastest round
_Seen = TypeVar("_Seen")


class DisturbedRoundsError(Exception):
    """Too few rounds in which every side took about as long as in its fastest: the machine was doing something else."""


def by_turns(sides: Mapping[str, Callable[[], _Seen]], num_rounds: int) -> dict[str, list[_Seen]]:
    """What each side gave, round by round: A B C, C B A, A B C, ..."""
    seen: dict[str, list[_Seen]] = {name: [] for name in sides}
    for number in range(num_rounds):
        for name in sides if number % 2 == 0 else reversed(list(sides)):
            seen[name].append(sides[name]())
    return seen


def quiet_rounds(
    sides: Mapping[str, Callable[[], _Seen]], num_rounds: int, *, seconds: Callable[[_Seen], float], most_tries: int
) -> dict[str, list[_Seen]]:
    """As `by_turns`, of rounds that nothing disturbed: each side within 10 % of its fastest of all rounds.

    Args:
        sides: by name.
        num_rounds: that are given back.
        seconds: of what a side gave.
        most_tries: rounds that are measured at most.

    Raises:
        DisturbedRoundsError: too few rounds were quiet. Nothing may be said by the others.
    """
    seen: dict[str, list[_Seen]] = {name: [] for name in sides}
    quiet: list[int] = []
    for number in range(most_tries):
        for name in sides if number % 2 == 0 else reversed(list(sides)):
            seen[name].append(sides[name]())
        quiet = undisturbed({name: [seconds(one) for one in of_side] for name, of_side in seen.items()})
        if len(quiet) >= num_rounds:
            return {name: [of_side[n] for n in quiet[:num_rounds]] for name, of_side in seen.items()}
    said = ", ".join(
        f"{name} {max(map(seconds, of_side)) / min(map(seconds, of_side)):.2f}x" for name, of_side in seen.items()
    )
    raise DisturbedRoundsError(
        f"refused: of {most_tries} rounds {len(quiet)} had every side within {MAX_SCATTER - 1:.0%} of its fastest, "
        f"{num_rounds} are needed (slowest over fastest: {said}). Something else runs on this machine: wait until it "
        "is idle, and measure again"
    )


def undisturbed(seconds: Mapping[str, Sequence[float]]) -> list[int]:
    """Numbers of the rounds in which every side is within 10 % of its fastest."""
    bounds = {name: MAX_SCATTER * min(of_side) for name, of_side in seconds.items()}
    rounds = range(min(map(len, seconds.values())))
    return [n for n in rounds if all(of_side[n] <= bounds[name] for name, of_side in seconds.items())]


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

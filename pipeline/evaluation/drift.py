"""Compares a run with the nights before it, in one line: loops, empty answers, answer length, failures.

Reads the totals in ``_RUN.json`` alone. A figure drifts where it lies farther from the nights before than chance takes
it: for shares by the binomial spread, for the length by the spread between nights.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import StorageError
from pipeline.runs.earlier_runs import list_runs
from pipeline.runs.run_folder import is_finished
from pipeline.runs.run_record import read_run_file
from pipeline.runs.totals import Totals, recorded_totals
from pipeline.storage import storage

NUM_NIGHTS = 7
_SPREADS = 3.0  # as many standard deviations are chance
_LEAST_SHARE = 0.01
_LEAST_LENGTH = 0.2


@dataclass(frozen=True, slots=True)
class Figure:
    """Holds one figure of a run and of the nights before it.

    Attributes:
        name: of the figure.
        value: of the run.
        before: of the nights before, together.
        is_share: whether it is a share; else it is in tokens.
        drifts: whether it lies farther off than chance takes it.
    """

    name: str
    value: float
    before: float
    is_share: bool
    drifts: bool

    def __str__(self) -> str:
        form = "{:.1%}" if self.is_share else "{:.0f} tokens"
        return f"{self.name} {form.format(self.value)} ({form.format(self.before)}){' DRIFTS' * self.drifts}"


def drift_line(run_uri: str, nights_uri: str | None) -> str | None:
    """Say how a finished run compares with the last seven runs before it in the folder of all nights.

    Returns:
        The line; None where the run is unfinished or empty, or no such run has rows.

    Raises:
        StorageError: a record cannot be read.
    """
    own = storage.folder_uri(run_uri)
    if not nights_uri or not is_finished(own):
        return None
    totals = recorded_totals(own)
    nights = _nights_before(own, storage.folder_uri(nights_uri))
    if not totals.num_rows or not nights:
        return None
    said = ", ".join(map(str, figures(totals, nights)))
    return f"{said}; in brackets: {len(nights)} run{'s' * (len(nights) != 1)} before"


def figures(totals: Totals, nights: Sequence[Totals]) -> list[Figure]:
    """Return the figures of a run with rows beside those of the nights before."""
    shares = {
        "loops": lambda one: (one.by_finish_reason.get("loop", 0), one.num_answered),
        "empty": lambda one: (one.num_empty or 0, one.num_answered if one.num_empty is not None else 0),
        "failed": lambda one: (one.by_status.get("failed", 0), one.num_rows),
    }
    found = []
    for name, counted in shares.items():
        (count, number), before = counted(totals), [counted(night) for night in nights]
        num_before = sum(n for _, n in before)
        if number and num_before:
            found.append(_share(name, count, number, sum(k for k, _ in before), num_before))
    lengths = [_length(night) for night in nights if night.num_answered]
    if lengths and totals.num_answered:
        found.append(_length_figure(_length(totals), lengths))
    return found


def _share(name: str, count: int, number: int, count_before: int, number_before: int) -> Figure:
    value, before = count / number, count_before / number_before
    likely = (count_before + 1) / (number_before + 2)  # so that a share of nothing has a spread, too
    spread = math.sqrt(likely * (1 - likely) * (1 / number + 1 / number_before))
    return Figure(name, value, before, True, abs(value - before) > max(_SPREADS * spread, _LEAST_SHARE))


def _length(totals: Totals) -> float:
    return totals.sums.get("num_generated_tokens", 0) / totals.num_answered


def _length_figure(value: float, lengths: Sequence[float]) -> Figure:
    before = statistics.fmean(lengths)
    allowed = max(_SPREADS * statistics.pstdev(lengths), _LEAST_LENGTH * before)
    return Figure("answer length", value, before, False, abs(value - before) > allowed)


def _nights_before(own: str, nights: str) -> list[Totals]:
    """Return the totals of the last runs that were created before this one and are finished, those with rows."""
    created = {run: read_run_file(run).get("created_at", "") for run in {*list_runs(nights), own}}
    earlier = sorted(
        (run for run in created if (created[run], run) < (created[own], own)), key=lambda run: created[run]
    )
    found: list[Totals] = []
    for run in reversed(earlier):
        if len(found) == NUM_NIGHTS:
            break
        try:
            totals = recorded_totals(run) if is_finished(run) else Totals()
        except StorageError:
            continue  # `verify` names it; a damaged night is none to compare with
        if totals.num_rows:
            found.append(totals)
    return found

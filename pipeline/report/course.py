"""Says how many rows a run made when: a histogram over its working time, without the pauses between its sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from pipeline.runs.sessions import SessionSpan

_NUM_BINS = 60


@dataclass(frozen=True, slots=True)
class Course:
    """Holds a run's rows over its working time.

    Attributes:
        began_at, ended_at: of the first session, and of the last session; in UTC.
        worked_s: seconds in which any session was at work.
        bin_s: seconds of a bin.
        num_rows: rows of each bin, failed ones included. num_failed: of these, the failed ones.
        session_starts: of each later session, its place in the working time, 0 to 1.
        num_untimed: rows of an earlier version, which do not say when they were made.
    """

    began_at: str
    ended_at: str
    worked_s: float
    bin_s: float
    num_rows: tuple[int, ...]
    num_failed: tuple[int, ...]
    session_starts: tuple[float, ...]
    num_untimed: int

    @property
    def peak_per_s(self) -> float:
        """Rows a second in the fullest bin."""
        return max(self.num_rows) / self.bin_s


def course_of(finished_s: np.ndarray, failed: np.ndarray, sessions: Sequence[SessionSpan]) -> Course | None:
    """Count rows over the working time; None where no row or no session says when.

    Args:
        finished_s: of each row, in seconds since 1970; NaN where it does not say.
        failed: whether it failed.
        sessions: of the run. One that did not say that it ended lasts until its last row.
    """
    timed = np.isfinite(finished_s)
    times_s, is_failed = finished_s[timed], failed[timed]
    spans = _spans(times_s, sessions)
    worked_s = float(sum(end - start for start, end in spans))
    if not len(times_s) or worked_s <= 0:
        return None
    starts = np.array([start for start, _ in spans])
    lengths = np.array([end - start for start, end in spans])
    before = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    own = np.clip(np.searchsorted(starts, times_s, side="right") - 1, 0, None)
    place_s = before[own] + np.clip(times_s - starts[own], 0.0, lengths[own])  # clocks of two drivers may differ
    bins = np.minimum((place_s / worked_s * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
    return Course(
        began_at=_iso(spans[0][0]),
        ended_at=_iso(spans[-1][1]),
        worked_s=worked_s,
        bin_s=worked_s / _NUM_BINS,
        num_rows=tuple(np.bincount(bins, minlength=_NUM_BINS).tolist()),
        num_failed=tuple(np.bincount(bins[is_failed], minlength=_NUM_BINS).tolist()),
        session_starts=tuple(float(at) for at in before[1:] / worked_s),
        num_untimed=int((~timed).sum()),
    )


def _spans(times_s: np.ndarray, sessions: Sequence[SessionSpan]) -> list[tuple[float, float]]:
    """When any session was at work: disjoint, in order."""
    began = sorted((datetime.fromisoformat(one.began_at).timestamp(), one.ended_at) for one in sessions)
    spans: list[tuple[float, float]] = []
    for number, (start, ended_at) in enumerate(began):
        following = began[number + 1][0] if number + 1 < len(began) else np.inf
        own = times_s[(times_s >= start) & (times_s < following)]
        end = datetime.fromisoformat(ended_at).timestamp() if ended_at else float(own.max(initial=start))
        if spans and start <= spans[-1][1]:  # two drivers at once
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((start, end))
    return spans


def _iso(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")

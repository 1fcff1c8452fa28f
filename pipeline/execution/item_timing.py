"""Measures how long an item waits and how long it takes, on the clock of the process that dispatches it.

The driver dispatches an item to a reader and then to a worker. The worker dispatches it to its model, request by
request. Driver and worker keep an `ItemTimeline` each, on their own clock. Only durations cross between hosts:
timestamps of two clocks are never subtracted.

A second belongs to exactly one stage. The reader counts its own seconds (`LoadStats`), the engine counts its own
(`Timing`), and a timeline counts the waits in between, which are the row's `queue_s`; its part in which no worker had
its model loaded yet is `model_wait_s`. `latency_s` is one measurement on
the driver's clock, from dispatching the load to the item's end. That the stages sum to the latency is therefore a
property that tests check, not an identity.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.records import LoadStats, ResultRow

if TYPE_CHECKING:
    from illava.requests import Generation


class ModelGaps:
    """Remembers when no worker had its model loaded, on the clock of this process; the first gap begins with it."""

    def __init__(self) -> None:
        self._gaps: list[tuple[float, float]] = []
        self._began_s: float | None = time.perf_counter()

    def note(self, *, is_loaded: bool) -> None:
        """Record whether any worker has its model loaded by now."""
        now_s = time.perf_counter()
        if is_loaded and self._began_s is not None:
            self._gaps.append((self._began_s, now_s))
            self._began_s = None
        elif not is_loaded and self._began_s is None:
            self._began_s = now_s

    def within(self, from_s: float, to_s: float) -> float:
        """Return the seconds of all gaps between two times of this clock."""
        gaps = [*self._gaps, (self._began_s, to_s)] if self._began_s is not None else self._gaps
        return sum(max(min(ended_s, to_s) - max(began_s, from_s), 0.0) for began_s, ended_s in gaps)


class ItemTimeline:
    """Sums an item's waits in one attempt and measures the attempt's latency, on the clock of this process.

    Attributes:
        began_s: when the item was first dispatched.
        stats: what loading took; set by the driver.
    """

    def __init__(self) -> None:
        self.began_s = time.perf_counter()
        self.stats = LoadStats()
        self._latest_s = self.began_s
        self._waited_s = self._waited_for_model_s = 0.0

    @property
    def since_dispatch_s(self) -> float:
        """Seconds since the item was dispatched; meaningful until it comes back."""
        return time.perf_counter() - self._latest_s

    def dispatched(self, gaps: ModelGaps | None = None) -> None:
        """Record that the item is dispatched now: it has waited since the event before, for a model in these gaps."""
        now_s = time.perf_counter()
        if gaps is not None:
            self._waited_for_model_s += gaps.within(self._latest_s, now_s)
        self._waited_s += now_s - self._latest_s
        self._latest_s = now_s

    def loaded(self, call_s: float, stats: LoadStats) -> None:
        """Record that the reader's result has arrived.

        Args:
            call_s: how long the load took, on the reader's clock. The item waited for the rest of the time.
            stats: seconds of the load, stage by stage.
        """
        self.stats = stats
        self._came_back(time.perf_counter(), call_s)

    def answered(self, generation: Generation, *, step_end_s: float) -> None:
        """Record the end of a request to this process's model, whose engine counts its own seconds."""
        timing = generation.timing
        if generation.error is None:
            self._latest_s = step_end_s
        else:  # the request failed inside a step, which went on for the other requests
            self._latest_s += timing.queue_s + timing.vision_s + timing.prefill_s + timing.decode_s

    def finalize(self, row: ResultRow, held_s: float) -> ResultRow:
        """Record that the worker's row has arrived; return the row with the latency and waits of the whole attempt.

        Args:
            row: its ``latency_s`` and ``queue_s`` come from the worker's timeline.
            held_s: how long the worker had the item, on the worker's clock, until the call that brought the row
                returned. The time in which the finished row waited for that return is no part of the latency.
        """
        self._came_back(time.perf_counter() - (held_s - row.latency_s), row.latency_s)
        return self.written_to(row)

    def finalize_failed(self, row: ResultRow) -> ResultRow:
        """Return the row of an item that no worker answered, with its latency and with its waits up to now."""
        self.dispatched()
        return self.written_to(row)

    def written_to(self, row: ResultRow) -> ResultRow:
        """Return the row as it ends now: latency up to the latest event, this timeline's waits added to its own."""
        return replace(
            row,
            queue_s=row.queue_s + self._waited_s,
            model_wait_s=(row.model_wait_s or 0.0) + self._waited_for_model_s,
            latency_s=self._latest_s - self.began_s,
            finished_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )

    def _came_back(self, now_s: float, took_s: float) -> None:
        self._waited_s += max(now_s - self._latest_s - took_s, 0.0)
        self._latest_s = now_s


def loaded_together(timelines: Sequence[ItemTimeline], call_s: float, stats: LoadStats) -> None:
    """Record one load that serves several items: its seconds count for the first item, the others waited for it."""
    first, *others = timelines
    first.loaded(call_s, stats)
    for timeline in others:
        timeline.loaded(0.0, stats.of_shared_load())

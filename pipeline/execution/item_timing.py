"""An item's way through a run, stamped on the clock of whoever hands it out, and the row's seconds made of the stamps.

The driver hands an item to a reader and then to a worker; the worker hands it to its model, request by request. Each
keeps an `ItemTimeline` on its own clock. Only durations cross between hosts: timestamps of two clocks are never
subtracted. A second belongs to exactly one stage, counted by whoever did the work: the reader (`LoadStats`), the engine
(`Timing`), and here the waits in between, which are the row's `queue_s`. `latency_s` is one measurement on the driver's
clock, from the load being handed out to the item's end. That the stages sum to the latency is therefore a property to
be tested, not an identity.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.records import LoadStats, ResultRow

if TYPE_CHECKING:
    from illava.requests import Generation


class ItemTimeline:
    """What an item waited in one attempt, and how long the attempt has taken, on the clock of this process.

    Attributes:
        began_s: the stamp of first handing the item out.
        stats: what loading took; set by the driver.
    """

    def __init__(self) -> None:
        self.began_s = time.perf_counter()
        self.stats = LoadStats()
        self._latest_s = self.began_s
        self._waited_s = 0.0

    @property
    def since_dispatch_s(self) -> float:
        """How long ago the item was handed out; asked while it is away."""
        return time.perf_counter() - self._latest_s

    def dispatched(self) -> None:
        """Stamp that the item is being handed out: it has waited since the stamp before."""
        now_s = time.perf_counter()
        self._waited_s += now_s - self._latest_s
        self._latest_s = now_s

    def loaded(self, call_s: float, stats: LoadStats) -> None:
        """Stamp that the reader's result is here.

        Args:
            call_s: how long the load took the reader, on the reader's clock. The item waited the rest.
            stats: of the load, stage by stage.
        """
        self.stats = stats
        self._came_back(time.perf_counter(), call_s)

    def answered(self, generation: Generation, *, step_end_s: float) -> None:
        """Stamp the end of a request on this process's model, whose engine has counted its seconds itself."""
        timing = generation.timing
        if generation.error is None:
            self._latest_s = step_end_s
        else:  # it ended inside a step whose return, for its neighbours' sake, came later
            self._latest_s += timing.queue_s + timing.vision_s + timing.prefill_s + timing.decode_s

    def finalize(self, row: ResultRow, held_s: float) -> ResultRow:
        """Stamp that the worker's row is here, and put the whole attempt's latency and waits into the row.

        Args:
            row: its ``latency_s`` and ``queue_s`` are of the worker's timeline.
            held_s: from the worker's taking the item over to the return of the call that brought the row, on the
                worker's clock. The finished row only waited for that return: no part of the latency.
        """
        self._came_back(time.perf_counter() - (held_s - row.latency_s), row.latency_s)
        return self.written_to(row)

    def settle_failed(self, row: ResultRow) -> ResultRow:
        """Put the latency and waits into the row of an item that no worker answered: it has waited until now."""
        self.dispatched()
        return self.written_to(row)

    def written_to(self, row: ResultRow) -> ResultRow:
        """The row with the latency up to the latest stamp, and this timeline's waits beside its own."""
        return replace(row, queue_s=row.queue_s + self._waited_s, latency_s=self._latest_s - self.began_s)

    def _came_back(self, now_s: float, took_s: float) -> None:
        self._waited_s += max(now_s - self._latest_s - took_s, 0.0)
        self._latest_s = now_s


def loaded_together(timelines: Sequence[ItemTimeline], call_s: float, stats: LoadStats) -> None:
    """Stamp one load for several items: it counts for the first item, and the others waited for it."""
    first, *others = timelines
    first.loaded(call_s, stats)
    for timeline in others:
        timeline.loaded(0.0, stats.of_follower())

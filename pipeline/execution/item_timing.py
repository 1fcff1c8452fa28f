"""One item's way through a run, stamped on the driver's clock, and the row's seconds made of it.

Only durations cross from other hosts: timestamps of two clocks are never subtracted. `latency_s` is one measurement on
one clock, from the load being handed out to the outcome being seen, less what the finished outcome waited for its call
to return. The stages are measured by whoever did the work; `queue_s` also holds every wait between them. That the
stages sum to the latency is therefore a property to be tested, not an identity.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeline.records import LoadStats, ResultRow


@dataclass(slots=True)
class Passage:
    """Stamps of the attempt that made the row.

    Attributes:
        load_started_s: the load was handed out.
        loaded_s: its result was seen.
        load_call_s: how long the load took the reader, on the reader's clock.
        handed_s: the loaded item was handed to a worker.
        stats: what loading took, stage by stage.
    """

    load_started_s: float = field(default_factory=time.perf_counter)
    loaded_s: float = 0.0
    load_call_s: float = 0.0
    handed_s: float = 0.0
    stats: LoadStats = field(default_factory=LoadStats)

    def loaded(self, load_call_s: float, stats: LoadStats) -> None:
        """The reader's result was just seen."""
        self.loaded_s, self.load_call_s, self.stats = time.perf_counter(), load_call_s, stats

    def handed(self) -> None:
        """The item is just being handed to a worker."""
        self.handed_s = time.perf_counter()

    @property
    def held_s(self) -> float:
        """Since the item was handed to its worker."""
        return time.perf_counter() - self.handed_s

    def settle(self, row: ResultRow, held_s: float) -> ResultRow:
        """The row as a worker made it, with the whole passage's latency and waits.

        Args:
            row: its ``latency_s`` is the worker's own stamp, from taking the item over to its end.
            held_s: from taking the item over to the return of the call that brought the row, on the worker's clock.
        """
        now_s = time.perf_counter()
        before_load_s = self.loaded_s - self.load_started_s - self.load_call_s
        before_worker_s = self.handed_s - self.loaded_s
        mailbox_s = now_s - self.handed_s - held_s
        waited_s = max(before_load_s, 0.0) + before_worker_s + max(mailbox_s, 0.0)
        return replace(
            row,
            queue_s=row.queue_s + waited_s,
            latency_s=now_s - self.load_started_s - (held_s - row.latency_s),
        )

    def settle_failed(self, row: ResultRow) -> ResultRow:
        """The row of an item that no worker answered: what its reader did not measure, it waited."""
        latency_s = time.perf_counter() - self.load_started_s
        staged_s = row.fetch_s + row.load_s + row.preprocess_s
        return replace(row, queue_s=max(latency_s - staged_s, 0.0), latency_s=latency_s)


def loaded_together(passages: Sequence[Passage], load_call_s: float, stats: LoadStats) -> None:
    """The result of one load for several items was just seen: it stands with the first, the others waited for it."""
    first, *others = passages
    first.loaded(load_call_s, stats)
    for passage in others:
        passage.loaded(0.0, stats.of_follower())

"""Shows a running command to people: its progress line, its heartbeat in the run folder, and the cluster's gauges."""

from __future__ import annotations

import time
from typing import Any

from pipeline.execution.executors import Executor, Gauges
from pipeline.execution.reporting.progress import Progress
from pipeline.execution.reporting.summary import RunStats
from pipeline.execution.scheduler import Scheduler
from pipeline.runs.heartbeat import Heartbeat

EVERY_S = 1.0


class Watch:
    """Tells of one command while it works; to be closed at its end.

    Args:
        run_uri: the run folder.
        session: name of the session.
        num_planned: items that this command has to do.
        stats: sums over its rows.
        gauges: of the cluster; None where there is none.
    """

    def __init__(
        self, run_uri: str, session: str, num_planned: int, stats: RunStats, gauges: Gauges | None = None
    ) -> None:
        self._num_planned, self._stats, self._gauges = num_planned, stats, gauges
        self.progress = Progress(num_planned, stats)
        self._began_s = self._told_s = time.monotonic()
        self._state = self._now(0)
        self._heartbeat = Heartbeat(run_uri, session, lambda: self._state)
        self._heartbeat.start()

    def tick(self, scheduler: Scheduler, executor: Executor) -> None:
        """Tell what is due; to be called often."""
        self.progress.tick(lambda: scheduler.queue_depths(capacity=executor.capacity))
        if time.monotonic() - self._told_s < EVERY_S:
            return
        self._told_s = time.monotonic()
        self._state = self._now(scheduler.num_in_work)
        self._set_gauges(scheduler.num_in_work, executor.actors)

    def close(self) -> None:
        """End the progress line and the heartbeat; nothing is planned or in work any more."""
        self.progress.close()
        self._heartbeat.close()
        self._num_planned = self._stats.num_rows
        self._set_gauges(0, {"vlm": 0, "reader": 0})

    def _now(self, num_in_work: int) -> dict[str, Any]:
        """Return what a heartbeat says; made in the thread that makes the rows."""
        return {
            "num_planned": self._num_planned,
            "num_rows": self._stats.num_rows,
            "num_failed": self._stats.statuses["failed"],
            "num_in_work": num_in_work,
            "wall_s": round(time.monotonic() - self._began_s, 3),
            "items_usd": self._stats.cost_usd,
        }

    def _set_gauges(self, num_in_work: int, actors: dict[str, int]) -> None:
        if self._gauges:
            waiting = max(self._num_planned - self._stats.num_rows - num_in_work, 0)
            self._gauges.set(planned=self._num_planned, waiting=waiting, in_work=num_in_work, actors=actors)

"""Runs a job in this one process, without Ray, for tests and debugging. Scheduler and rows are the same as on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.config.placement import batch_of
from pipeline.config.schema import JobConfig
from pipeline.execution.item_timing import ItemTimeline, loaded_together
from pipeline.execution.scheduler import Scheduler
from pipeline.execution.worker import VLMWorker, WorkerUsage
from pipeline.loading.load_report import ItemLoader, ReadingUsage, load_reported
from pipeline.phases import phase

_WORKER = "local"
_WAIT_S = 0.001


class LocalExecutor:
    """Alternates between one loader and one worker: fills the batch, then advances it by a step.

    The executor checks an item's deadline between two steps; a step that never returns stops everything.

    Args:
        config: the job.
        scheduler: decides what to do.
        make_loader: builds the loader.
        make_worker: builds the worker; takes as long as loading the model does.
    """

    def __init__(
        self,
        config: JobConfig,
        scheduler: Scheduler,
        *,
        make_loader: Callable[[], ItemLoader],
        make_worker: Callable[[], VLMWorker],
    ) -> None:
        self._scheduler = scheduler
        self._max_running = batch_of(config)
        self._item_timeout_s = config.runtime.item_timeout_s
        self.capacity = None
        self.actors = {"vlm": 1, "reader": 1}
        self.reading = ReadingUsage()
        with phase(f"loading the model {config.model.model_id}", after_s=0):
            self._worker = make_worker()
        self._loader = make_loader()

    def poll(self) -> None:
        """Load one more item while the batch is not full, else advance the batch by one step."""
        held = self._scheduler.all_running(_WORKER)
        has_capacity = len(held) < self._max_running and not any(lease.quarantined for lease in held)
        if has_capacity and (self._dispatch() or self._load_next()):
            return
        if not self._scheduler.num_running(_WORKER):
            time.sleep(_WAIT_S)  # only the publisher works; polling in a loop would keep the interpreter from it
            return
        for outcome in self._worker.step():
            lease = self._scheduler.running(_WORKER, outcome.row.item_id)
            row = lease.timeline.finalize(outcome.row, time.perf_counter() - outcome.taken_s)
            self._scheduler.finished(_WORKER, row)
        self._check_deadline()

    def usage(self) -> list[WorkerUsage]:
        """Return the usage of the one worker."""
        return [self._worker.usage()]

    def close(self) -> None:
        """End the decoder's child process and remove the cache."""
        self._loader.close()

    def _load_next(self) -> bool:
        lease = self._scheduler.lease()
        if lease is None:
            return False
        for one in lease.group:
            one.timeline = ItemTimeline()
        report, lease.payload = load_reported(self._loader, lease.item)
        loaded_together([one.timeline for one in lease.group], report.call_s, report.stats)
        self.reading.add(report.stats)
        if report.error is not None:
            self._scheduler.not_loaded(lease, report.error)
            return True
        self._scheduler.loaded(lease, report.nbytes)
        self._dispatch()
        return True

    def _dispatch(self) -> bool:
        """Dispatch the items of one load to the worker; return whether there were any."""
        ready = self._scheduler.assign(_WORKER, 1)
        for lease in ready:
            lease.timeline.dispatched()
            loaded = lease.payload.for_item(lease.item)
            self._worker.add(loaded, attempts=lease.attempts, shard_index=lease.shard_index)
        return bool(ready)

    def _check_deadline(self) -> None:
        held = self._scheduler.all_running(_WORKER)
        if held and held[0].timeline.since_dispatch_s > self._item_timeout_s:
            self._worker.reset()
            reason = f"not back from the worker within runtime.item_timeout_s = {self._item_timeout_s:g} s"
            self._scheduler.worker_lost(_WORKER, reason, timed_out=True)

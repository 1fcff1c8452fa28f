"""Runs a job on Ray actors: feeds readers and VLM actors, takes their answers, and replaces those that die.

The scheduler decides which items are leased. The executor keeps two calls queued at every actor, so that neither
decoding nor the running batch waits for the driver. It never imports ray (`pipeline.execution.ray.actors` does) and
never sees pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from pipeline.config.placement import batch_of
from pipeline.config.schema import JobConfig
from pipeline.execution.item_timing import ItemTimeline, ModelGaps, loaded_together
from pipeline.execution.lease import Lease
from pipeline.execution.ray.actor_pool import (
    CALLS_PER_ACTOR,
    ActorPoolAutoscaler,
    CircuitBreaker,
    PoolState,
    ReaderHandle,
    ScaleDecision,
    VLMHandle,
)
from pipeline.execution.ray.actors import ActorLostError, BatchInput, PayloadLostError, RayCluster
from pipeline.execution.scheduler import Scheduler
from pipeline.execution.worker import VLMWorker, WorkerUsage
from pipeline.loading.load_report import ItemLoader, ReadingUsage
from pipeline.redaction import redacted, visible

logger = logging.getLogger(__name__)
# Items that a VLM actor holds beyond its batch, so that a freed place is filled within the same call.
LOOKAHEAD_ITEMS = 4
POLL_S = 0.2
SHUTDOWN_TIMEOUT_S = 5.0


class RayExecutor:
    """Drives the actors of one job.

    Args:
        cluster: where actors run.
        config: the placed job.
        scheduler: decides what to do.
        make_loader: builds a loader, in a reader's process.
        make_worker: builds a worker, in a VLM actor's process.
    """

    def __init__(
        self,
        cluster: RayCluster,
        config: JobConfig,
        scheduler: Scheduler,
        *,
        make_loader: Callable[[], ItemLoader],
        make_worker: Callable[[], VLMWorker],
    ) -> None:
        runtime = config.runtime
        self._cluster, self._config, self._scheduler = cluster, config, scheduler
        self._make_loader, self._make_worker = make_loader, make_worker
        self._max_held = batch_of(config) + LOOKAHEAD_ITEMS
        self._max_vlms, self._max_readers = runtime.num_vlm_actors.max, runtime.num_reader_actors
        self._item_timeout_s = runtime.item_timeout_s
        self._vlm_deaths = CircuitBreaker("the VLM actors", runtime.num_vlm_actors.max)
        self._reader_deaths = CircuitBreaker("the readers", runtime.num_reader_actors)
        self._calls: dict[Any, Callable[[Any], None]] = {}
        self._vlms: list[VLMHandle] = []
        self._readers: list[ReaderHandle] = []
        self._past_usage: list[WorkerUsage] = []
        self._num_spawned = 0
        self._model_gaps, self.reading = ModelGaps(), ReadingUsage()
        self._autoscaler = ActorPoolAutoscaler(runtime.num_vlm_actors.min, now_s=time.monotonic())

    def poll(self) -> None:
        """Dispatch items to actors with capacity, then take every answer that is ready; wait briefly for the first."""
        self._resize()
        self._model_gaps.note(is_loaded=any(vlm.started for vlm in self._vlms))
        self._feed_readers()
        self._feed_vlms()
        self._check_deadlines()
        for reference in self._cluster.wait(list(self._calls), POLL_S):
            # A lost actor's other calls are dropped with it, and some of them may be in this same list.
            take = self._calls.pop(reference, None)
            if take is not None:
                take(reference)

    @property
    def capacity(self) -> int:
        """Items that fill the batches of the started VLM actors."""
        return sum(vlm.started for vlm in self._vlms) * (self._max_held - LOOKAHEAD_ITEMS)

    @property
    def actors(self) -> dict[str, int]:
        """How many actors have started and stand."""
        return {"vlm": sum(one.started for one in self._vlms), "reader": sum(one.started for one in self._readers)}

    def usage(self) -> list[WorkerUsage]:
        """Return the usage of every VLM actor of this job up to now; idle time after the last answer counts too."""
        asked = {vlm.actor.usage.remote(): vlm for vlm in self._vlms if vlm.started}
        for reference in self._cluster.wait_all(list(asked), SHUTDOWN_TIMEOUT_S):
            with suppress(ActorLostError):  # the usage in its last answer is kept
                asked[reference].usage = self._cluster.result(reference)
        return [*self._past_usage, *(vlm.usage for vlm in self._vlms)]

    def close(self) -> None:
        """End all actors."""
        # Readers that still answer remove their cache.
        self._cluster.wait_all([one.actor.close.remote() for one in self._readers if one.started], SHUTDOWN_TIMEOUT_S)
        for actor in [reader.actor for reader in self._readers] + [vlm.actor for vlm in self._vlms]:
            self._cluster.kill(actor)

    # --- readers

    def _spawn_reader(self) -> None:
        reader = ReaderHandle(self._cluster.spawn_reader(self._make_loader))
        self._readers.append(reader)
        self._expect(reader, self._cluster.placed(reader.actor), partial(self._placed, reader))
        self._expect(reader, reader.actor.start.remote(), partial(self._reader_started, reader))

    def _feed_readers(self) -> None:
        while ready := [reader for reader in self._readers if reader.has_capacity]:
            reader = min(ready, key=lambda one: len(one.queue))
            lease = self._scheduler.lease(idle=not reader.queue)
            if lease is None:
                return
            for one in lease.group:
                one.timeline = ItemTimeline()
            report, lease.payload = self._cluster.load(reader.actor, lease.item)
            reader.queue.append(lease)
            self._expect(reader, report, partial(self._loaded, reader, lease))

    def _reader_started(self, reader: ReaderHandle, reference: Any) -> None:
        try:
            self._cluster.result(reference)
        except ActorLostError as reason:
            self._reader_lost(reader, reason)
        else:
            reader.started = True

    def _loaded(self, reader: ReaderHandle, lease: Lease, reference: Any) -> None:
        try:
            report = self._cluster.result(reference)
        except (ActorLostError, PayloadLostError) as reason:
            self._reader_lost(reader, reason)
            return
        reader.calls.discard(reference)
        reader.queue.remove(lease)
        loaded_together([one.timeline for one in lease.group], report.call_s, report.stats)
        self.reading.add(report.stats)
        self._reader_deaths.record_success()
        if report.error is not None:
            self._scheduler.not_loaded(lease, report.error)
        else:
            self._scheduler.loaded(lease, report.nbytes)

    def _reader_lost(self, reader: ReaderHandle, reason: Exception) -> None:
        num_items = sum(len(lease.group) for lease in reader.queue)
        said = visible(str(reason))
        logger.warning("a reader was lost (%s); its %d items are started again", said, num_items)
        self._forget(reader)
        self._readers.remove(reader)
        self._scheduler.reader_lost(reader.queue)
        self._reader_deaths.record_death(reason, while_starting=not reader.started)

    # --- VLM actors

    def _spawn_vlm(self) -> None:
        self._num_spawned += 1
        vlm = VLMHandle(f"vlm-{self._num_spawned}", self._cluster.spawn_vlm(self._config, self._make_worker))
        self._vlms.append(vlm)
        self._expect(vlm, self._cluster.placed(vlm.actor), partial(self._placed, vlm))
        self._expect(vlm, vlm.actor.start.remote(), partial(self._vlm_started, vlm))

    def _feed_vlms(self) -> None:
        given: dict[str, list[Lease]] = {}
        open_to_calls = [vlm for vlm in self._vlms if vlm.started and len(vlm.calls) < CALLS_PER_ACTOR]
        # One load at a time to the emptiest, so that the last items of a job are spread over all actors.
        candidates = list(open_to_calls)
        while candidates:
            vlm = min(candidates, key=lambda one: self._scheduler.num_running(one.name))
            capacity = self._max_held - self._scheduler.num_running(vlm.name)
            leases = self._scheduler.assign(vlm.name, min(capacity, 1))
            if leases:
                given.setdefault(vlm.name, []).extend(leases)
            else:
                candidates.remove(vlm)
        for vlm in open_to_calls:
            leases = given.get(vlm.name, [])
            if leases or self._scheduler.num_running(vlm.name):
                self._advance(vlm, leases)

    def _advance(self, vlm: VLMHandle, leases: list[Lease]) -> None:
        for lease in leases:
            lease.timeline.dispatched(self._model_gaps)
        payloads = list(dict.fromkeys(lease.payload for lease in leases))
        inputs = [
            BatchInput(lease.item, payloads.index(lease.payload), lease.attempts, lease.shard_index) for lease in leases
        ]
        call = vlm.actor.advance.remote(inputs, *payloads)
        self._expect(vlm, call, partial(self._advanced, vlm, leases))

    def _vlm_started(self, vlm: VLMHandle, reference: Any) -> None:
        try:
            self._cluster.result(reference)
        except ActorLostError as reason:
            self._vlm_lost(vlm, reason)
        else:
            vlm.calls.discard(reference)
            vlm.started = True

    def _advanced(self, vlm: VLMHandle, leases: list[Lease], reference: Any) -> None:
        try:
            result = self._cluster.result(reference)
        except PayloadLostError:
            vlm.calls.discard(reference)
            self._scheduler.payloads_lost(leases)
            return
        except ActorLostError as reason:
            self._vlm_lost(vlm, reason)
            return
        vlm.calls.discard(reference)
        vlm.usage = result.usage
        for row, held_s in result.finished:
            lease = self._scheduler.running(vlm.name, row.item_id)
            self._scheduler.finished(vlm.name, lease.timeline.finalize(row, held_s))
            if row.status != "failed":
                self._vlm_deaths.record_success()

    def _check_deadlines(self) -> None:
        """End every actor that has held an item beyond its deadline: a hung forward pass cannot be interrupted."""
        for vlm in list(self._vlms):
            held = self._scheduler.all_running(vlm.name)
            if held and held[0].timeline.since_dispatch_s > self._item_timeout_s:
                limit = f"runtime.item_timeout_s = {self._item_timeout_s:g} s"
                self._vlm_lost(vlm, ActorLostError(f"not back from its VLM actor within {limit}"), timed_out=True)

    def _vlm_lost(self, vlm: VLMHandle, reason: Exception, *, timed_out: bool = False) -> None:
        num_items = self._scheduler.num_running(vlm.name)
        said = visible(str(reason))
        logger.warning("a VLM actor was lost (%s); its %d items are started again", said, num_items)
        self._forget(vlm)
        self._vlms.remove(vlm)
        self._past_usage.append(vlm.usage)
        self._scheduler.worker_lost(vlm.name, redacted(str(reason)), timed_out=timed_out)
        self._vlm_deaths.record_death(reason, while_starting=not vlm.started)

    # --- both

    def _expect(self, handle: ReaderHandle | VLMHandle, reference: Any, take: Callable[[Any], None]) -> None:
        handle.calls.add(reference)
        self._calls[reference] = take

    def _forget(self, handle: ReaderHandle | VLMHandle) -> None:
        """Drop an actor's calls and end its process: an actor that raised may still hold its GPU."""
        for reference in handle.calls:
            self._calls.pop(reference, None)
        self._cluster.kill(handle.actor)

    def _placed(self, handle: ReaderHandle | VLMHandle, reference: Any) -> None:
        handle.calls.discard(reference)
        with suppress(ActorLostError):  # its `start` failed as well, and that call reports it
            self._cluster.result(reference)
            handle.placed = True

    def _resize(self) -> None:
        """Request the missing actors in the order in which work can start; log a line while too few are ready."""
        now_s = time.monotonic()
        vlms, readers = PoolState.of(self._vlms, self._max_vlms), PoolState.of(self._readers, self._max_readers)
        for_vlms, for_readers = self._autoscaler.decide(vlms, readers, now_s=now_s)
        self._scale(self._vlms, for_vlms, self._spawn_vlm, now_s=now_s)
        self._scale(self._readers, for_readers, self._spawn_reader, now_s=now_s)
        resources = self._cluster.resources
        if line := self._autoscaler.waiting_message(vlms, readers, resources=resources, now_s=now_s):
            logger.warning("%s", line)

    def _scale(
        self,
        handles: Sequence[ReaderHandle | VLMHandle],
        decision: ScaleDecision,
        spawn: Callable[[], None],
        *,
        now_s: float,
    ) -> None:
        for handle in [handle for handle in handles if not handle.placed][: decision.cancel]:
            self._release(handle)
        if decision.release and (releasable := [handle for handle in handles if handle.releasable]):
            self._release(releasable[-1])
            self._autoscaler.released(now_s=now_s)
        for _ in range(decision.add):
            spawn()

    def _release(self, handle: ReaderHandle | VLMHandle) -> None:
        """End an actor to free its place: its items start again, and none is quarantined."""
        self._forget(handle)
        if isinstance(handle, ReaderHandle):
            self._readers.remove(handle)
            return
        self._vlms.remove(handle)
        self._past_usage.append(handle.usage)
        self._scheduler.worker_released(handle.name)

"""Runs a job on Ray actors: feeds readers and models, takes their answers, replaces those that die.

Never imports ray (see `pipeline.actors`) and never sees pixels. What is leased is the scheduler's; this keeps two
calls queued at every actor, so that neither decoding nor the running batch waits for the driver.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.actors import ActorLostError, Entry, PayloadLostError, RayCluster
from pipeline.config import JobConfig
from pipeline.death_count import DeathCount
from pipeline.errors import ClusterError
from pipeline.lease import Lease
from pipeline.loading.load_report import ItemLoader, ReadingUsage
from pipeline.passage import Passage, loaded_together
from pipeline.scheduler import Scheduler
from pipeline.worker import VLMWorker, WorkerUsage

CALLS_PER_ACTOR = 2
# Items a VLM actor holds beyond its batch, so that a freed place is filled within the same call.
LOOKAHEAD_ITEMS = 4
START_TIMEOUT_S = 1800.0
SAY_WAITING_EVERY_S = 30.0
TURN_S = 0.2
FAREWELL_S = 5.0


@dataclass(slots=True, eq=False)
class _Reader:
    actor: Any
    started: bool = False
    queue: list[Lease] = field(default_factory=list)
    calls: set[Any] = field(default_factory=set)

    @property
    def has_room(self) -> bool:
        suspect = any(lease.load_suspect for lease in self.queue)
        return self.started and not suspect and len(self.queue) < CALLS_PER_ACTOR


@dataclass(slots=True, eq=False)
class _VLM:
    name: str
    actor: Any
    started: bool = False
    calls: set[Any] = field(default_factory=set)
    usage: WorkerUsage = field(default_factory=WorkerUsage)


class RayExecutor:
    """The event loop's body over a fleet of actors.

    Args:
        cluster: where actors run.
        config: the job.
        scheduler: what to do.
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
        self._cluster, self._scheduler = cluster, scheduler
        self._make_loader, self._make_worker = make_loader, make_worker
        self._most_held = config.model.max_batch_requests + LOOKAHEAD_ITEMS
        self._fewest_vlms = runtime.num_vlm_actors.min
        self._item_timeout_s = runtime.item_timeout_s
        self._vlm_deaths = DeathCount("the VLM actors", runtime.num_vlm_actors.max)
        self._reader_deaths = DeathCount("the readers", runtime.num_reader_actors)
        self._calls: dict[Any, Callable[[Any], None]] = {}
        self._vlms: list[_VLM] = []
        self._readers: list[_Reader] = []
        self._past_usage: list[WorkerUsage] = []
        self._num_spawned = 0
        self.reading = ReadingUsage()
        self._short_since_s = self._said_waiting_s = time.monotonic()
        for _ in range(runtime.num_vlm_actors.max):
            self._spawn_vlm()
        for _ in range(runtime.num_reader_actors):
            self._spawn_reader()

    def turn(self) -> None:
        """Hand out what can be, then take every answer that is there; waits a moment for the first."""
        self._feed_readers()
        self._feed_vlms()
        self._check_deadlines()
        self._check_standing()
        for reference in self._cluster.wait(list(self._calls), TURN_S):
            # An actor's loss takes its other calls with it, some of which may be in this same list.
            take = self._calls.pop(reference, None)
            if take is not None:
                take(reference)

    @property
    def room(self) -> int:
        """Items that fill the batches of the VLM actors that stand."""
        return sum(vlm.started for vlm in self._vlms) * (self._most_held - LOOKAHEAD_ITEMS)

    def usage(self) -> list[WorkerUsage]:
        """Of every VLM actor there was, up to now: standing idle behind the last answer counts too."""
        asked = {vlm.actor.usage.remote(): vlm for vlm in self._vlms if vlm.started}
        for reference in self._cluster.wait_all(list(asked), FAREWELL_S):
            with suppress(ActorLostError):  # then what its last answer said stands
                asked[reference].usage = self._cluster.result(reference)
        return [*self._past_usage, *(vlm.usage for vlm in self._vlms)]

    def close(self) -> None:
        """End all actors."""
        # Readers that still answer remove what they cached.
        self._cluster.wait_all([one.actor.close.remote() for one in self._readers if one.started], FAREWELL_S)
        for actor in [reader.actor for reader in self._readers] + [vlm.actor for vlm in self._vlms]:
            self._cluster.kill(actor)

    # --- readers

    def _spawn_reader(self) -> None:
        reader = _Reader(self._cluster.spawn_reader(self._make_loader))
        self._readers.append(reader)
        self._expect(reader, reader.actor.start.remote(), partial(self._reader_started, reader))

    def _feed_readers(self) -> None:
        while ready := [reader for reader in self._readers if reader.has_room]:
            reader = min(ready, key=lambda one: len(one.queue))
            lease = self._scheduler.lease(idle=not reader.queue)
            if lease is None:
                return
            for one in lease.group:
                one.passage = Passage()
            report, lease.payload = self._cluster.load(reader.actor, lease.item)
            reader.queue.append(lease)
            self._expect(reader, report, partial(self._loaded, reader, lease))

    def _reader_started(self, reader: _Reader, reference: Any) -> None:
        try:
            self._cluster.result(reference)
        except ActorLostError as reason:
            self._reader_lost(reader, reason)
        else:
            reader.started = True

    def _loaded(self, reader: _Reader, lease: Lease, reference: Any) -> None:
        try:
            report = self._cluster.result(reference)
        except (ActorLostError, PayloadLostError) as reason:
            self._reader_lost(reader, reason)
            return
        reader.calls.discard(reference)
        reader.queue.remove(lease)
        loaded_together([one.passage for one in lease.group], report.call_s, report.stats)
        self.reading.add(report.stats)
        self._reader_deaths.success()
        if report.error is not None:
            self._scheduler.not_loaded(lease, report.error)
        else:
            self._scheduler.loaded(lease, report.nbytes)

    def _reader_lost(self, reader: _Reader, reason: Exception) -> None:
        num_items = sum(len(lease.group) for lease in reader.queue)
        print(f"a reader was lost ({reason}); its {num_items} items are started again", file=sys.stderr)
        self._forget(reader)
        self._readers.remove(reader)
        self._scheduler.reader_lost(reader.queue)
        self._reader_deaths.one_more(reason, while_starting=not reader.started)
        self._spawn_reader()

    # --- VLM actors

    def _spawn_vlm(self) -> None:
        self._num_spawned += 1
        vlm = _VLM(f"vlm-{self._num_spawned}", self._cluster.spawn_vlm(self._make_worker))
        self._vlms.append(vlm)
        self._expect(vlm, vlm.actor.start.remote(), partial(self._vlm_started, vlm))

    def _feed_vlms(self) -> None:
        given: dict[str, list[Lease]] = {}
        open_to_calls = [vlm for vlm in self._vlms if vlm.started and len(vlm.calls) < CALLS_PER_ACTOR]
        # One load at a time to the emptiest, so that the last items of a job are spread over all actors.
        takers = list(open_to_calls)
        while takers:
            vlm = min(takers, key=lambda one: self._scheduler.num_running(one.name))
            room = self._most_held - self._scheduler.num_running(vlm.name)
            leases = self._scheduler.assign(vlm.name, min(room, 1))
            if leases:
                given.setdefault(vlm.name, []).extend(leases)
            else:
                takers.remove(vlm)
        for vlm in open_to_calls:
            leases = given.get(vlm.name, [])
            if leases or self._scheduler.num_running(vlm.name):
                self._advance(vlm, leases)

    def _advance(self, vlm: _VLM, leases: list[Lease]) -> None:
        for lease in leases:
            lease.passage.handed()
        payloads = list(dict.fromkeys(lease.payload for lease in leases))
        places = [payloads.index(lease.payload) for lease in leases]
        entries = [
            Entry(lease.item, place, lease.attempts, lease.shard_index)
            for lease, place in zip(leases, places, strict=True)
        ]
        call = vlm.actor.advance.remote(entries, *payloads)
        self._expect(vlm, call, partial(self._advanced, vlm, leases))

    def _vlm_started(self, vlm: _VLM, reference: Any) -> None:
        try:
            self._cluster.result(reference)
        except ActorLostError as reason:
            self._vlm_lost(vlm, reason)
        else:
            vlm.calls.discard(reference)
            vlm.started = True

    def _advanced(self, vlm: _VLM, leases: list[Lease], reference: Any) -> None:
        try:
            advance = self._cluster.result(reference)
        except PayloadLostError:
            vlm.calls.discard(reference)
            for lease in leases:
                self._scheduler.payload_lost(lease)
            return
        except ActorLostError as reason:
            self._vlm_lost(vlm, reason)
            return
        vlm.calls.discard(reference)
        vlm.usage = advance.usage
        for row, held_s in advance.finished:
            lease = self._scheduler.running(vlm.name, row.item_id)
            self._scheduler.finished(vlm.name, lease.passage.settle(row, held_s))
            if row.status != "failed":
                self._vlm_deaths.success()

    def _check_deadlines(self) -> None:
        """End the actors that do not give an item back: neither a hung forward nor an endless loop can be asked to."""
        for vlm in list(self._vlms):
            held = self._scheduler.all_running(vlm.name)
            if held and held[0].passage.held_s > self._item_timeout_s:
                limit = f"runtime.item_timeout_s = {self._item_timeout_s:g} s"
                self._vlm_lost(vlm, ActorLostError(f"not back from its VLM actor within {limit}"), timed_out=True)

    def _vlm_lost(self, vlm: _VLM, reason: Exception, *, timed_out: bool = False) -> None:
        num_items = self._scheduler.num_running(vlm.name)
        print(f"a VLM actor was lost ({reason}); its {num_items} items are started again", file=sys.stderr)
        self._forget(vlm)
        self._vlms.remove(vlm)
        self._past_usage.append(vlm.usage)
        self._scheduler.worker_lost(vlm.name, str(reason), timed_out=timed_out)
        self._vlm_deaths.one_more(reason, while_starting=not vlm.started)
        self._spawn_vlm()

    # --- both

    def _expect(self, slot: _Reader | _VLM, reference: Any, take: Callable[[Any], None]) -> None:
        slot.calls.add(reference)
        self._calls[reference] = take

    def _forget(self, slot: _Reader | _VLM) -> None:
        """Drop an actor's calls and make sure of its end: one that raised may still hold its GPU."""
        for reference in slot.calls:
            self._calls.pop(reference, None)
        self._cluster.kill(slot.actor)

    def _check_standing(self) -> None:
        """Say that too few actors stand, now and then; give up when it lasts."""
        num_vlms, num_readers = (sum(one.started for one in slots) for slots in (self._vlms, self._readers))
        now_s = time.monotonic()
        if num_vlms >= self._fewest_vlms and num_readers:
            self._short_since_s = self._said_waiting_s = now_s
            return
        waited_s = now_s - self._short_since_s
        message = (
            f"waiting for actors for {waited_s:.0f} s: {num_vlms} VLM actors of at least {self._fewest_vlms} and "
            f"{num_readers} readers stand; the cluster has {self._cluster.resources()}"
        )
        if waited_s >= START_TIMEOUT_S:
            raise ClusterError(f"{message}; lower runtime.gpus_per_actor, cpus_per_actor or num_vlm_actors.min")
        if now_s - self._said_waiting_s >= SAY_WAITING_EVERY_S:
            self._said_waiting_s = now_s
            print(message, file=sys.stderr)

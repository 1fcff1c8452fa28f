"""Schedules items: the pure state machine between readers, workers and published shards.

Decides which item is loaded next, which worker an item goes to, what a failure or a death means for an item, and when a
shard is complete. It knows nothing of Ray, media, models or clocks: an executor reports what happened.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.errors import ItemError
from pipeline.execution.lease import MAX_DEATHS, Lease, QueueDepths, SharedBuffer
from pipeline.faults import fault_point
from pipeline.records import MediaItem, ResultRow, RowErrorType, Shard


@dataclass(slots=True)
class _OpenShard:
    leases: tuple[Lease, ...]
    rows: dict[str, ResultRow] = field(default_factory=dict)


class Scheduler:
    """Leases items of a few open shards at a time and collects their rows; no barrier separates shards.

    Args:
        pending: indices of the shards to do, in order.
        open_shard: returns one shard's items that need a row; a shard without such items is complete.
        estimate_bytes: estimates the size of an item's loaded media.
        failed_row: makes the row of an item that cannot be processed.
        on_row: is called once with every row, when it is made.
        max_inflight_bytes: bound on all loaded media; one item is always let through.
        max_open_shards: bound on the shards that are open and not published.
        max_attempts: bound on the tries of an item after retryable errors.
        max_together: bound on the neighbouring items of the same media that share a load and go to one worker.
    """

    def __init__(
        self,
        pending: Iterable[int],
        open_shard: Callable[[int], Shard],
        *,
        estimate_bytes: Callable[[MediaItem], int],
        failed_row: Callable[[Lease, RowErrorType, str], ResultRow],
        on_row: Callable[[ResultRow], None],
        max_inflight_bytes: int,
        max_open_shards: int,
        max_attempts: int,
        max_together: int = 1,
    ) -> None:
        self._pending = deque(pending)
        self._open_shard = open_shard
        self._estimate_bytes = estimate_bytes
        self._failed_row = failed_row
        self._on_row = on_row
        self._max_inflight_bytes = max_inflight_bytes
        self._max_open_shards = max_open_shards
        self._max_attempts = max_attempts
        self._max_together = max_together
        self._open: dict[int, _OpenShard] = {}
        self._complete: deque[tuple[int, list[ResultRow]]] = deque()
        self._waiting: deque[Lease] = deque()
        self._loaded: deque[list[Lease]] = deque()  # what goes to one worker together
        self._quarantined: deque[Lease] = deque()
        self._running: dict[Hashable, dict[str, Lease]] = {}
        self.inflight_bytes = 0

    @property
    def done(self) -> bool:
        """Whether every pending shard has been published."""
        return not self._pending and not self._open

    @property
    def num_open_shards(self) -> int:
        return len(self._open)

    @property
    def num_in_work(self) -> int:
        """Items of the open shards that have no row yet."""
        return sum(len(shard.leases) - len(shard.rows) for shard in self._open.values())

    def queue_depths(self, *, capacity: int | None) -> QueueDepths:
        """Count where the items of the open shards are; ``capacity`` is the workers', as in `QueueDepths`."""
        phases = Counter(lease.phase for shard in self._open.values() for lease in shard.leases)
        num_complete = sum(len(shard.rows) == len(shard.leases) for shard in self._open.values())
        return QueueDepths(phases["loading"], phases["loaded"], phases["running"], num_complete, capacity)

    def stop_opening(self) -> None:
        """Open no further shard; open shards are finished."""
        self._pending.clear()

    def num_running(self, worker: Hashable) -> int:
        """Return how many items a worker holds."""
        return len(self._running.get(worker, ()))

    def running(self, worker: Hashable, item_id: str) -> Lease:
        """Return an item that a worker holds."""
        return self._running[worker][item_id]

    def all_running(self, worker: Hashable) -> list[Lease]:
        """Return all items that a worker holds, the longest held first."""
        return list(self._running.get(worker, {}).values())

    # --- readers

    def lease(self, *, idle: bool = True) -> Lease | None:
        """Lease the next item to load, with its `shared_load_items`; None at a bound or where no item is left.

        Args:
            idle: whether the reader holds no item. An item quarantined in loading needs an idle reader.
        """
        while not self._waiting:
            if not self._open_next():
                return None
        head = self._waiting[0]
        if head.load_quarantined and not idle:
            return None
        estimate = self._estimate_bytes(head.item)
        if self.inflight_bytes and self.inflight_bytes + estimate > self._max_inflight_bytes:
            return None
        fault_point("lease", head.item.item_id)
        group = self._take_group()
        buffer = SharedBuffer(num_leases=len(group))
        for lease in group:
            lease.phase, lease.attempts, lease.buffer = "loading", lease.attempts + 1, buffer
        self._set_bytes(buffer, estimate)
        head.shared_load_items = tuple(group[1:])
        return head

    def loaded(self, lease: Lease, nbytes: int) -> None:
        """Record that a reader delivered the media of the item and of all items that share its load."""
        self._set_bytes(lease.buffer, nbytes)
        for one in lease.group:
            one.phase, one.payload = "loaded", lease.payload
        self._quarantined.extend(one for one in lease.group if one.quarantined)
        if together := [one for one in lease.group if not one.quarantined]:
            self._loaded.append(together)

    def not_loaded(self, lease: Lease, error: ItemError) -> None:
        """Record that a reader could not load the item: all items of the load are tried again or become failed rows."""
        for one in lease.group:
            one.failures += 1
            if error.retryable and one.failures < self._max_attempts:
                self._requeue(one, first=False)
            else:
                self._fail(one, error.error_type, str(error))

    def reader_lost(self, leases: Iterable[Lease]) -> None:
        """Record that a reader died. Which call ended it is unknown: the answer to an earlier one may be lost with it.

        Args:
            leases: as returned by `lease`; all items of their loads are meant.
        """
        calls = [lease.group for lease in leases]
        for lease in (one for group in reversed(calls) for one in reversed(group)):
            lease.load_quarantined = True
            if len(calls) == 1 and self._died(lease):
                self._fail(lease, "worker_died", f"loading it ended its reader {lease.deaths} times")
            else:
                self._requeue(lease, first=True)

    # --- workers

    def assign(self, worker: Hashable, capacity: int) -> list[Lease]:
        """Assign loaded items to a worker, up to its ``capacity``; items of one load stay together, even beyond it.

        A quarantined item needs an empty worker.
        """
        held = self._running.setdefault(worker, {})
        if any(lease.quarantined for lease in held.values()):
            return []
        if self._quarantined and not held:
            return [self._run(self._quarantined.popleft(), worker)]
        given: list[Lease] = []
        while self._loaded and len(given) < capacity:
            given += (self._run(lease, worker) for lease in self._loaded.popleft())
        return given

    def finished(self, worker: Hashable, row: ResultRow) -> None:
        """Record that a worker made an item's row."""
        self._close(self._running[worker].pop(row.item_id), row)

    def payloads_lost(self, leases: Sequence[Lease]) -> None:
        """Record that loaded media were lost before their worker saw them (with a node): load them again.

        An item whose tries are used up fails.

        Args:
            leases: the items of one call. Where they come from several loads, it is unknown whose media were lost: an
                item without tries left then gets one more, alone.
        """
        one_load = len({id(lease.buffer) for lease in leases}) == 1
        for lease in reversed(leases):
            del self._running[lease.worker][lease.item.item_id]
            lease.failures += 1
            if one_load and lease.failures >= self._max_attempts:
                self._fail(lease, "media_lost", f"what was loaded was lost with its node; {lease.attempts} attempts")
            else:
                lease.quarantined |= lease.failures >= self._max_attempts
                self._requeue(lease, first=True)

    def worker_released(self, worker: Hashable) -> None:
        """Record that a worker was ended to free its place: its items start again, and none is quarantined."""
        for lease in reversed(self._running.pop(worker, {}).values()):
            self._requeue(lease, first=True)

    def worker_lost(self, worker: Hashable, reason: str = "unknown", *, timed_out: bool = False) -> None:
        """Record that a worker died: its items start again, each of them alone.

        Args:
            worker: the worker that died.
            reason: what it said at its end.
            timed_out: the worker was ended because an item did not come back. Running alone shows which item it was.
        """
        leases = list(self._running.pop(worker, {}).values())
        alone = len(leases) == 1
        for lease in leases:
            lease.quarantined, lease.worker = True, None
            lease.timeouts += timed_out
            died_often = alone and self._died(lease)
            if timed_out and alone and (died_often or lease.timeouts >= MAX_DEATHS):
                self._fail(lease, "item_timeout", f"{reason}, {lease.timeouts} times, the last time alone")
            elif died_often:
                message = f"it ended its worker {lease.deaths} times, the last time alone ({reason})"
                self._fail(lease, "worker_died", message)
            else:
                lease.phase, lease.attempts = "loaded", lease.attempts + 1
                self._quarantined.append(lease)

    # --- sink

    def take_complete(self) -> list[tuple[int, list[ResultRow]]]:
        """Return the shards whose items all have rows, rows in the order of the items; each shard once."""
        taken = list(self._complete)
        self._complete.clear()
        return taken

    def published(self, shard_index: int) -> None:
        """Record that the shard is published."""
        del self._open[shard_index]

    # --- internal

    def _open_next(self) -> bool:
        if not self._pending or len(self._open) >= self._max_open_shards:
            return False
        index = self._pending.popleft()
        leases = tuple(Lease(item, index) for item in self._open_shard(index).items)
        self._open[index] = _OpenShard(leases)
        self._waiting.extend(leases)
        if not leases:
            self._complete.append((index, []))
        return True

    def _take_group(self) -> list[Lease]:
        """Take the first waiting item and the items behind it that may share its load."""
        group = [self._waiting.popleft()]
        while self._waiting and len(group) < self._max_together and self._waiting[0].may_share_load_of(group[0]):
            group.append(self._waiting.popleft())
        return group

    def _set_bytes(self, buffer: SharedBuffer, nbytes: int) -> None:
        self.inflight_bytes += nbytes - buffer.nbytes
        buffer.nbytes = nbytes

    def _release_buffer(self, lease: Lease) -> None:
        """Record that an item needs its media no more; the last item of a load frees the bytes."""
        lease.buffer.num_leases -= 1
        if not lease.buffer.num_leases:
            self._set_bytes(lease.buffer, 0)
        lease.payload = None

    def _requeue(self, lease: Lease, *, first: bool) -> None:
        self._release_buffer(lease)
        lease.phase, lease.worker, lease.shared_load_items = "waiting", None, ()
        # An item that lost its reader goes to the front, so that its shard ends soon; one that failed waits its turn.
        (self._waiting.appendleft if first else self._waiting.append)(lease)

    def _run(self, lease: Lease, worker: Hashable) -> Lease:
        lease.phase, lease.worker = "running", worker
        self._running[worker][lease.item.item_id] = lease
        return lease

    def _died(self, lease: Lease) -> bool:
        lease.deaths += 1
        return lease.deaths >= min(MAX_DEATHS, self._max_attempts)

    def _fail(self, lease: Lease, error_type: RowErrorType, message: str) -> None:
        self._close(lease, self._failed_row(lease, error_type, message))

    def _close(self, lease: Lease, row: ResultRow) -> None:
        self._release_buffer(lease)
        lease.phase = "done"
        shard = self._open[lease.shard_index]
        shard.rows[row.item_id] = row
        self._on_row(row)
        if len(shard.rows) == len(shard.leases):
            ordered = [shard.rows[done.item.item_id] for done in shard.leases]
            self._complete.append((lease.shard_index, ordered))

"""Where every item is: the pure state machine between readers, workers and committed shards.

Decides what is loaded next, what goes to which worker, what a failure or a death means for an item, and when a shard
is complete. Knows nothing of Ray, media, models or clocks: an executor tells it what happened.
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
    """Leases items of a few open shards at a time and collects their rows; no barrier between shards.

    Args:
        pending: indices of the shards to do, in order.
        open_shard: reads one shard's items that need a row; none make it complete.
        estimate_bytes: size of an item once loaded, before it is.
        failed_row: makes the row of an item that cannot be processed.
        on_row: sees every row once, as it is made.
        max_inflight_bytes: loaded media anywhere; one item is always let through.
        max_open_shards: shards begun and not yet published.
        max_attempts: tries after retryable errors.
        max_together: neighbours that ask about the same media are loaded once and go to one worker, so many at most.
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
        self._suspects: deque[Lease] = deque()
        self._running: dict[Hashable, dict[str, Lease]] = {}
        self.inflight_bytes = 0

    @property
    def done(self) -> bool:
        """Every pending shard has been published."""
        return not self._pending and not self._open

    @property
    def num_open_shards(self) -> int:
        return len(self._open)

    @property
    def num_in_work(self) -> int:
        """Items of the open shards that have no row yet."""
        return sum(len(shard.leases) - len(shard.rows) for shard in self._open.values())

    def flow(self, *, capacity: int | None) -> QueueDepths:
        """Where the items of the open shards are; ``capacity`` is the workers', as `QueueDepths` has it."""
        phases = Counter(lease.phase for shard in self._open.values() for lease in shard.leases)
        num_complete = sum(len(shard.rows) == len(shard.leases) for shard in self._open.values())
        return QueueDepths(phases["loading"], phases["loaded"], phases["running"], num_complete, capacity)

    def open_no_more(self) -> None:
        """Begin no other shard; what is open is finished."""
        self._pending.clear()

    def num_running(self, worker: Hashable) -> int:
        """Items a worker holds."""
        return len(self._running.get(worker, ()))

    def running(self, worker: Hashable, item_id: str) -> Lease:
        """An item a worker holds."""
        return self._running[worker][item_id]

    def all_running(self, worker: Hashable) -> list[Lease]:
        """All items a worker holds, the longest held first."""
        return list(self._running.get(worker, {}).values())

    # --- to the readers

    def lease(self, *, idle: bool = True) -> Lease | None:
        """The next item to load, its `shared_load_items` with it; None while the bounds are reached or nothing is left.

        Args:
            idle: the reader holds nothing. A suspect gets an idle reader to itself.
        """
        while not self._waiting:
            if not self._open_next():
                return None
        head = self._waiting[0]
        if head.load_suspect and not idle:
            return None
        estimate = self._estimate_bytes(head.item)
        if self.inflight_bytes and self.inflight_bytes + estimate > self._max_inflight_bytes:
            return None
        fault_point("lease", head.item.item_id)
        group = self._take_group()
        hold = SharedBuffer(num_leases=len(group))
        for lease in group:
            lease.phase, lease.attempts, lease.hold = "loading", lease.attempts + 1, hold
        self._set_bytes(hold, estimate)
        head.shared_load_items = tuple(group[1:])
        return head

    def loaded(self, lease: Lease, nbytes: int) -> None:
        """A reader delivered the item's media, which are its followers' too."""
        self._set_bytes(lease.hold, nbytes)
        for one in lease.group:
            one.phase, one.payload = "loaded", lease.payload
        self._suspects.extend(one for one in lease.group if one.suspect)
        if together := [one for one in lease.group if not one.suspect]:
            self._loaded.append(together)

    def not_loaded(self, lease: Lease, error: ItemError) -> None:
        """A reader could not load the item: it and its followers wait for another try, or become failed rows."""
        for one in lease.group:
            one.failures += 1
            if error.retryable and one.failures < self._max_attempts:
                self._wait_again(one, first=False)
            else:
                self._fail(one, error.error_type, str(error))

    def reader_lost(self, leases: Iterable[Lease]) -> None:
        """A reader died. In which of its calls is not known: the answer to an earlier one may be lost with it.

        Args:
            leases: as `lease` gave them out; their followers are meant too.
        """
        calls = [lease.group for lease in leases]
        for lease in (one for group in reversed(calls) for one in reversed(group)):
            lease.load_suspect = True
            if len(calls) == 1 and self._died(lease):
                self._fail(lease, "worker_died", f"loading it ended its reader {lease.deaths} times")
            else:
                self._wait_again(lease, first=True)

    # --- to the workers

    def assign(self, worker: Hashable, capacity: int) -> list[Lease]:
        """Loaded items for a worker, until its ``capacity`` is taken; what was loaded together stays together, even so.

        A suspect gets an empty worker to itself.
        """
        held = self._running.setdefault(worker, {})
        if any(lease.suspect for lease in held.values()):
            return []
        if self._suspects and not held:
            return [self._run(self._suspects.popleft(), worker)]
        given: list[Lease] = []
        while self._loaded and len(given) < capacity:
            given += (self._run(lease, worker) for lease in self._loaded.popleft())
        return given

    def finished(self, worker: Hashable, row: ResultRow) -> None:
        """A worker made an item's row."""
        self._close(self._running[worker].pop(row.item_id), row)

    def payloads_lost(self, leases: Sequence[Lease]) -> None:
        """Loaded media are gone before their worker saw them (a node was lost): load again, while tries are left.

        Args:
            leases: of one call. If of several loads, whose media are gone is not known: the last try is another, alone.
        """
        one_load = len({id(lease.hold) for lease in leases}) == 1
        for lease in reversed(leases):
            del self._running[lease.worker][lease.item.item_id]
            lease.failures += 1
            if one_load and lease.failures >= self._max_attempts:
                self._fail(lease, "media_lost", f"what was loaded was lost with its node; {lease.attempts} attempts")
            else:
                lease.suspect |= lease.failures >= self._max_attempts
                self._wait_again(lease, first=True)

    def worker_dismissed(self, worker: Hashable) -> None:
        """A worker was ended for the sake of others: what it held is begun again, and nobody is suspected."""
        for lease in reversed(self._running.pop(worker, {}).values()):
            self._wait_again(lease, first=True)

    def worker_lost(self, worker: Hashable, reason: str = "unknown", *, timed_out: bool = False) -> None:
        """A worker died: only its items are started again, each of them alone.

        Args:
            worker: who.
            reason: its last words.
            timed_out: it was ended because an item did not come back; which one, shows when they are alone.
        """
        leases = list(self._running.pop(worker, {}).values())
        alone = len(leases) == 1
        for lease in leases:
            lease.suspect, lease.worker = True, None
            lease.timeouts += timed_out
            died_often = alone and self._died(lease)
            if timed_out and alone and (died_often or lease.timeouts >= MAX_DEATHS):
                self._fail(lease, "item_timeout", f"{reason}, {lease.timeouts} times, the last time alone")
            elif died_often:
                message = f"it ended its worker {lease.deaths} times, the last time alone ({reason})"
                self._fail(lease, "worker_died", message)
            else:
                lease.phase, lease.attempts = "loaded", lease.attempts + 1
                self._suspects.append(lease)

    # --- to the sink

    def take_complete(self) -> list[tuple[int, list[ResultRow]]]:
        """Shards whose items all have rows, in the order of the items; each is given out once."""
        taken = list(self._complete)
        self._complete.clear()
        return taken

    def published(self, shard_index: int) -> None:
        """The shard stands in the output."""
        del self._open[shard_index]

    # --- inside

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
        """The head of the queue and the neighbours behind it that may share its load."""
        group = [self._waiting.popleft()]
        while self._waiting and len(group) < self._max_together and self._waiting[0].may_follow(group[0]):
            group.append(self._waiting.popleft())
        return group

    def _set_bytes(self, hold: SharedBuffer, nbytes: int) -> None:
        self.inflight_bytes += nbytes - hold.nbytes
        hold.nbytes = nbytes

    def _let_go(self, lease: Lease) -> None:
        """The lease needs its media no more; the last of those that shared them frees the bytes."""
        lease.hold.num_leases -= 1
        if not lease.hold.num_leases:
            self._set_bytes(lease.hold, 0)
        lease.payload = None

    def _wait_again(self, lease: Lease, *, first: bool) -> None:
        self._let_go(lease)
        lease.phase, lease.worker, lease.shared_load_items = "waiting", None, ()
        # What lost its reader goes to the front, so that its shard ends soon; what failed gets some time to pass.
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
        self._let_go(lease)
        lease.phase = "done"
        shard = self._open[lease.shard_index]
        shard.rows[row.item_id] = row
        self._on_row(row)
        if len(shard.rows) == len(shard.leases):
            ordered = [shard.rows[done.item.item_id] for done in shard.leases]
            self._complete.append((lease.shard_index, ordered))

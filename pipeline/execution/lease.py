"""`Lease`: one item on its way to its row, and what it shares with neighbours; `QueueDepths`: where a run's leases are.

Plain state; `pipeline.execution.scheduler` says how it changes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.execution.item_timing import ItemTimeline
from pipeline.records import LOAD_FIELDS, MediaItem

Phase = Literal["waiting", "loading", "loaded", "running", "done"]

# An item that was alone in a worker each time, and the worker died each time, is what killed it.
MAX_DEATHS = 2


@dataclass(slots=True, eq=False)
class SharedBuffer:
    """One load's bytes in flight; they count until nobody needs the media any more.

    Attributes:
        num_leases: items that still need them.
        nbytes: the estimate until they are loaded, then the truth.
    """

    num_leases: int = 0
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class Lease:
    """One item on its way to its row. The scheduler alone changes it, `payload` and `timeline` excepted.

    Attributes:
        item: as in the manifest.
        shard_index: the shard it is committed with.
        phase: where it is.
        attempts: times it was started, the present one included.
        failures: attempts that ended in a retryable error, or in the loss of what was loaded.
        deaths: workers or readers that died while this item was the only suspect.
        timeouts: workers that were ended because this item, or one beside it, did not come back.
        suspect: it was in a worker that died, or its media were lost too often; from now on it runs alone, so that
            its neighbours are safe from it.
        load_suspect: likewise, in a reader that died.
        shared_load_items: items that this one's load serves too.
        hold: what its media count in flight, together with those they were loaded for.
        worker: who runs it.
        payload: the executor's handle on the loaded media.
        timeline: the executor's stamps; there once a reader was given the item.
    """

    item: MediaItem
    shard_index: int
    phase: Phase = "waiting"
    attempts: int = 0
    failures: int = 0
    deaths: int = 0
    timeouts: int = 0
    suspect: bool = False
    load_suspect: bool = False
    shared_load_items: tuple[Lease, ...] = ()
    hold: SharedBuffer = field(default_factory=SharedBuffer)
    worker: Hashable = None
    payload: Any = None
    timeline: ItemTimeline = field(init=False, repr=False)

    @property
    def group(self) -> tuple[Lease, ...]:
        """The item and its followers, in order: what one load serves."""
        return self, *self.shared_load_items

    def may_follow(self, head: Lease) -> bool:
        """Whether the head's load serves this one too; a suspect, alone in its reader, follows only another."""
        return self.asks_about_media_of(head) and (head.load_suspect or not self.load_suspect)

    def asks_about_media_of(self, other: Lease) -> bool:
        """Whether one load serves both: the same objects in the same versions, read in the same way."""
        return all(getattr(self.item, name) == getattr(other.item, name) for name in LOAD_FIELDS)


@dataclass(frozen=True, slots=True)
class QueueDepths:
    """Where the items of the open shards are at one moment.

    Attributes:
        num_loading: with the readers.
        num_loaded: loaded, and with no worker yet.
        num_running: with the workers.
        num_unpublished: shards that are complete and do not stand in the output yet.
        capacity: items that fill the batches of the workers that stand; None where loading and working take turns, so
            that neither waits for the other.
    """

    num_loading: int
    num_loaded: int
    num_running: int
    num_unpublished: int
    capacity: int | None

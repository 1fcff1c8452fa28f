"""Holds the state of one item on its way to its row (`Lease`), and counts where a run's items are (`QueueDepths`).

Plain state; `pipeline.execution.scheduler` decides how it changes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.execution.item_timing import ItemTimeline
from pipeline.records import LOAD_FIELDS, MediaItem

Phase = Literal["waiting", "loading", "loaded", "running", "done"]

# An item ends its worker if the worker dies twice while it holds no other item.
MAX_DEATHS = 2


@dataclass(slots=True, eq=False)
class SharedBuffer:
    """Counts one load's bytes in flight until no item needs the media any more.

    Attributes:
        num_leases: items that still need the media.
        nbytes: estimated until the media are loaded, measured afterwards.
    """

    num_leases: int = 0
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class Lease:
    """Tracks one item on its way to its row. Only the scheduler changes it, except `payload` and `timeline`.

    Attributes:
        item: as in the manifest.
        shard_index: the shard that the row is published with.
        phase: where the item is.
        attempts: times the item was started, the present one included.
        failures: attempts that ended in a retryable error, or in the loss of the loaded media.
        deaths: workers or readers that died while they held this item alone.
        timeouts: workers that were ended because this item, or one in the same batch, did not come back.
        quarantined: the item was in a worker that died, or its media were lost too often. A quarantined item runs
            alone, so that it cannot harm others.
        load_quarantined: the item was in a reader that died. It is loaded alone.
        shared_load_items: other items that this one's load serves.
        buffer: bytes of its media in flight, counted once for all items that share the load.
        worker: the worker that runs the item.
        payload: the executor's handle on the loaded media.
        timeline: the executor's measurements; set when the item is dispatched to a reader.
    """

    item: MediaItem
    shard_index: int
    phase: Phase = "waiting"
    attempts: int = 0
    failures: int = 0
    deaths: int = 0
    timeouts: int = 0
    quarantined: bool = False
    load_quarantined: bool = False
    shared_load_items: tuple[Lease, ...] = ()
    buffer: SharedBuffer = field(default_factory=SharedBuffer)
    worker: Hashable = None
    payload: Any = None
    timeline: ItemTimeline = field(init=False, repr=False)

    @property
    def group(self) -> tuple[Lease, ...]:
        """The items that one load serves, this one first."""
        return self, *self.shared_load_items

    def may_share_load_of(self, head: Lease) -> bool:
        """Whether one load may serve both; an item quarantined in loading shares only the load of another such item."""
        return self.has_same_media_as(head) and (head.load_quarantined or not self.load_quarantined)

    def has_same_media_as(self, other: Lease) -> bool:
        """Whether both items name the same objects in the same versions, read in the same way."""
        return all(getattr(self.item, name) == getattr(other.item, name) for name in LOAD_FIELDS)


@dataclass(frozen=True, slots=True)
class QueueDepths:
    """Counts where the items of the open shards are at one moment.

    Attributes:
        num_loading: items that readers hold.
        num_loaded: loaded items that wait for a worker.
        num_running: items that workers hold.
        num_unpublished: complete shards that are not published yet.
        capacity: items that fill the batches of the started workers; None where loading and working alternate, so that
            neither waits for the other.
    """

    num_loading: int
    num_loaded: int
    num_running: int
    num_unpublished: int
    capacity: int | None

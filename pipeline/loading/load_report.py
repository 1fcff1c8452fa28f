"""One load, timed and with its failure caught: what a reader tells the driver beside the media themselves.

Knows nothing of Ray; the media travel apart from the report, so that a driver never sees pixels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import ItemError, PipelineError
from pipeline.faults import fault_point
from pipeline.records import LoadedItem, LoadStats, MediaItem
from pipeline.redaction import redacted


class ItemLoader(Protocol):
    """What reads media: `pipeline.loading.loader.Loader`, or a test's own."""

    def load(self, item: MediaItem) -> LoadedItem:
        """The item at model size; raises `ItemError`."""

    def close(self) -> None:
        """End child processes, remove what was cached."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of one load.

    Attributes:
        call_s: the whole call, on the reader's clock.
        stats: its stages; of a failed load what was spent until then.
        nbytes: of the loaded media.
        error: why there are none.
    """

    call_s: float
    stats: LoadStats
    nbytes: int = 0
    error: ItemError | None = None


@dataclass(slots=True)
class ReadingUsage:
    """What a session's loads took together, failed and repeated ones included; of a reader that died, what it told.

    Attributes:
        cpu_s: CPU seconds of readers and their children.
        storage_requests: made to the store.
        bytes_fetched: that crossed from it.
    """

    cpu_s: float = 0.0
    storage_requests: int = 0
    bytes_fetched: int = 0

    def add(self, stats: LoadStats) -> None:
        """One more load."""
        self.cpu_s += stats.cpu_s
        self.storage_requests += stats.storage_requests
        self.bytes_fetched += stats.bytes_fetched


def load_reported(loader: ItemLoader, item: MediaItem) -> tuple[LoadReport, LoadedItem | None]:
    """Load one item.

    Raises:
        PipelineError: the run as a whole cannot go on (credentials, the store).
    """
    begin_s = time.perf_counter()
    try:
        fault_point("load", item.item_id)
        loaded = loader.load(item)
    except ItemError as reason:
        error = reason
    except PipelineError:
        raise
    except Exception as defect:  # one item's defect must not cost its neighbours their reader
        error = ItemError("internal_error", redacted(f"loading raised {type(defect).__name__}: {defect}"))
    else:
        return LoadReport(time.perf_counter() - begin_s, loaded.stats, loaded.nbytes), loaded
    call_s = time.perf_counter() - begin_s
    return LoadReport(call_s, error.stats or LoadStats(load_s=call_s), error=error), None

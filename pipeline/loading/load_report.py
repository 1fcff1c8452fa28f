"""What one load takes, and what a reader tells the driver of it beside the media themselves.

The media travel apart from the report, so that a driver never sees pixels. Knows nothing of Ray, nor of why a try was
not the last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import ItemError, PipelineError
from pipeline.faults import fault_point
from pipeline.records import LoadedItem, LoadStats, MediaItem
from pipeline.redaction import redacted

if TYPE_CHECKING:
    from pipeline.loading.sandbox.client import DecoderProcess
    from pipeline.loading.staging import Staging


class ItemLoader(Protocol):
    """What reads media: `pipeline.loading.loader.Loader`, or a test's own."""

    def load(self, item: MediaItem) -> LoadedItem:
        """The item at model size; raises `ItemError`."""

    def close(self) -> None:
        """End child processes, remove what was cached."""


class LoadMeter:
    """Seconds, CPU, bytes and requests of one load, all its tries together; and how long its child may still take.

    Runs from when it is made. For one thread.

    Args:
        staging, decoder: what the load uses; their counts go on from load to load.
        child_s: the child's limit, over all tries. The store has time-outs of its own.
    """

    def __init__(self, staging: Staging, decoder: DecoderProcess, *, child_s: float) -> None:
        self._staging, self._decoder, self._left_s = staging, decoder, child_s
        self._fetch_s = 0.0
        self._began_s = time.perf_counter()
        self._cpu_before_s = self._cpu_s()
        self._fetched_before = staging.bytes_fetched, staging.num_requests

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """The store is asked within."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self._fetch_s += time.perf_counter() - began_s

    @contextmanager
    def child(self) -> Iterator[float]:
        """The child is asked within; its deadline on `time.monotonic`."""
        began_s = time.monotonic()
        try:
            yield began_s + self._left_s
        finally:
            self._left_s -= time.monotonic() - began_s

    def spent(self, *, preprocess_s: float = 0.0, decoder: str = "") -> LoadStats:
        """Everything up to now; what was neither the store nor preprocessing is loading."""
        took_s = time.perf_counter() - self._began_s
        num_bytes, num_requests = self._fetched_before
        return LoadStats(
            fetch_s=self._fetch_s,
            load_s=max(0.0, took_s - self._fetch_s - preprocess_s),
            preprocess_s=preprocess_s,
            cpu_s=max(0.0, self._cpu_s() - self._cpu_before_s),
            bytes_fetched=self._staging.bytes_fetched - num_bytes,
            storage_requests=self._staging.num_requests - num_requests,
            decoder=decoder,
        )

    def _cpu_s(self) -> float:
        return time.thread_time() + self._decoder.cpu_s


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

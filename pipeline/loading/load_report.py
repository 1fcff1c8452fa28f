"""Measures what a load takes (`LoadMeter`), and reports it from a reader to the driver (`LoadReport`).

Media and report travel separately, so that the driver never sees pixels.
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
    """Loads items: `pipeline.loading.loader.Loader`, or a test's own."""

    def load(self, item: MediaItem) -> LoadedItem:
        """Load the item at model size; raise `ItemError` where that fails."""

    def close(self) -> None:
        """End child processes and remove the cache."""


class LoadMeter:
    """Measures one load over all its tries: seconds, CPU seconds, bytes and requests. Limits the child's time.

    A meter starts when it is made, and serves one thread.

    Args:
        staging, decoder: the parts that the load uses; their counters run on from load to load.
        child_s: limit on the child's time over all tries. The store has timeouts of its own.
    """

    def __init__(self, staging: Staging, decoder: DecoderProcess, *, child_s: float) -> None:
        self._staging, self._decoder, self._left_s = staging, decoder, child_s
        self._fetch_s = 0.0
        self._began_s = time.perf_counter()
        self._cpu_before_s = self._cpu_s()
        self._fetched_before = staging.bytes_fetched, staging.num_requests

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Count the time in this block as fetching."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self._fetch_s += time.perf_counter() - began_s

    @contextmanager
    def child(self) -> Iterator[float]:
        """Count the time in this block against the child's limit; yield the child's deadline, on `time.monotonic`."""
        began_s = time.monotonic()
        try:
            yield began_s + self._left_s
        finally:
            self._left_s -= time.monotonic() - began_s

    def spent(self, *, preprocess_s: float = 0.0, decoder: str = "") -> LoadStats:
        """Return what the load took up to now; time that is neither fetching nor preprocessing counts as loading."""
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
    """Reports one load.

    Attributes:
        call_s: duration of the whole call, on the reader's clock.
        stats: seconds by stage; of a failed load, what was spent until it failed.
        nbytes: bytes of the loaded media.
        error: why the load failed; None where it did not.
    """

    call_s: float
    stats: LoadStats
    nbytes: int = 0
    error: ItemError | None = None


@dataclass(slots=True)
class ReadingUsage:
    """Sums what a session's loads took, failed and repeated ones included.

    A reader that died counts with the loads that it reported.

    Attributes:
        cpu_s: CPU seconds of readers and their children.
        storage_requests: requests to the store.
        bytes_fetched: bytes received from the store.
    """

    cpu_s: float = 0.0
    storage_requests: int = 0
    bytes_fetched: int = 0

    def add(self, stats: LoadStats) -> None:
        """Add one load."""
        self.cpu_s += stats.cpu_s
        self.storage_requests += stats.storage_requests
        self.bytes_fetched += stats.bytes_fetched


def load_reported(loader: ItemLoader, item: MediaItem) -> tuple[LoadReport, LoadedItem | None]:
    """Load one item; return the report, and the media where the load succeeded.

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
    except Exception as defect:  # a defect that one item shows must not end the reader of other items
        error = ItemError("internal_error", redacted(f"loading raised {type(defect).__name__}: {defect}"))
    else:
        return LoadReport(time.perf_counter() - begin_s, loaded.stats, loaded.nbytes), loaded
    call_s = time.perf_counter() - begin_s
    return LoadReport(call_s, error.stats or LoadStats(load_s=call_s), error=error), None

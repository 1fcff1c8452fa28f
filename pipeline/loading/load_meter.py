"""What one load takes, all its tries together: seconds, CPU, bytes and requests; and how long its child may still take.

Knows nothing of what is loaded, nor of why a try was not the last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.loading.sandbox.client import DecoderProcess
from pipeline.loading.staging import Staging
from pipeline.records import LoadStats


class LoadMeter:
    """Runs from when it is made. For one thread.

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

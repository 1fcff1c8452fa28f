"""Publishes complete shards on one thread beside the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from pipeline.execution.scheduler import Scheduler
from pipeline.records import ResultRow


class Sink(Protocol):
    """Writes shards: `pipeline.runs.parquet_sink.ParquetSink` or `pipeline.runs.retry.RetrySink`."""

    def publish(self, shard_index: int, rows: Sequence[ResultRow]) -> Any:
        """Write one whole shard."""


class Publisher:
    """Takes complete shards from the scheduler and reports back when they are published."""

    def __init__(self, sink: Sink, scheduler: Scheduler) -> None:
        self._sink, self._scheduler = sink, scheduler
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self._writing: dict[int, Future[Any]] = {}

    def poll(self) -> None:
        """Start writing complete shards and finalize written ones; an error of a write is raised here."""
        for index, rows in self._scheduler.take_complete():
            self._writing[index] = self._thread.submit(self._sink.publish, index, rows)
        for index in [index for index, written in self._writing.items() if written.done()]:
            self._writing.pop(index).result()
            self._scheduler.published(index)

    def close(self) -> None:
        """Publish every shard that is complete; rows of the others are computed again by the next run."""
        try:
            self.poll()
        finally:  # no shard is written after the caller was told that the run ended
            self._thread.shutdown(wait=True)
        self.poll()

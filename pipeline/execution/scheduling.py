"""Builds a run's scheduler: what an item's media may take, and what the row of an item is that fails."""

from __future__ import annotations

import math
from collections.abc import Sequence

from illava.preprocess import Preprocessor
from pipeline.config.placement import batch_of
from pipeline.execution.executors import RowListener
from pipeline.execution.lease import Lease
from pipeline.execution.rows import RowMaker, RunInfo
from pipeline.execution.scheduler import Scheduler
from pipeline.records import MediaItem, ResultRow, RowErrorType
from pipeline.runs.parquet_sink import ParquetSink
from pipeline.runs.retry import RetrySink
from pipeline.runs.run_folder import Run
from pipeline.tasks.build import build_task


def build_scheduler(
    run: Run,
    pending: list[int],
    sink: ParquetSink | RetrySink,
    preprocessor: Preprocessor,
    *,
    run_info: RunInfo,
    listeners: Sequence[RowListener],
) -> Scheduler:
    """Build the scheduler of a placed run.

    Args:
        run: the run.
        pending: shards to do, in order.
        sink: opens them.
        preprocessor: bounds the bytes of loaded media.
        run_info: names the run in the rows.
        listeners: are called with every row.
    """
    config = run.config
    rows = RowMaker(config, run_info)

    def failed_row(lease: Lease, error_type: RowErrorType, message: str) -> ResultRow:
        row = rows.failed(
            lease.item,
            error_type,
            message,
            attempts=lease.attempts,
            shard_index=lease.shard_index,
            stats=lease.timeline.stats,
        )
        return lease.timeline.finalize_failed(row)

    def report(row: ResultRow) -> None:
        for listener in listeners:
            listener(row)

    def estimate_bytes(item: MediaItem) -> int:
        media, per_request = config.media, build_task(config.task).media_per_request
        if item.media_kind == "video":
            return preprocessor.max_nbytes(media.num_frames)
        num_images = media.max_pages if item.media_kind == "document" else len(item.uris)
        per_request = min(per_request or num_images, num_images)
        return math.ceil(num_images / per_request) * preprocessor.max_nbytes(per_request)

    return Scheduler(
        pending,
        sink.open_shard,
        estimate_bytes=estimate_bytes,
        failed_row=failed_row,
        on_row=report,
        max_inflight_bytes=config.runtime.max_inflight_bytes,
        max_open_shards=config.runtime.max_open_shards,
        max_attempts=config.runtime.max_attempts,
        max_together=batch_of(config),
    )

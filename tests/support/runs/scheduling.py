"""Makes a scheduler without Ray, media or models, and moves it on. Rows are (item_id, error_type) tuples."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.execution.scheduler import Scheduler
from pipeline.records import MediaItem, Shard


class Row(NamedTuple):
    item_id: str
    error_type: str | None = None


def make(
    num_shards: int = 2,
    per_shard: int = 3,
    *,
    inflight: int = 100,
    open_shards: int = 4,
    attempts: int = 3,
    per_medium: int = 1,
    together: int = 1,
) -> tuple[Scheduler, list[Row]]:
    def shard(index: int) -> Shard:
        ids = range(index * per_shard, (index + 1) * per_shard)
        return Shard(
            index, tuple(MediaItem(f"i{n:04}", (f"{n // per_medium}.mp4",), "video", (1,), ("",)) for n in ids)
        )

    rows: list[Row] = []
    scheduler = Scheduler(
        range(num_shards),
        shard,
        estimate_bytes=lambda item: 10,
        failed_row=lambda lease, error_type, message: Row(lease.item.item_id, error_type),
        on_row=rows.append,
        max_inflight_bytes=inflight,
        max_open_shards=open_shards,
        max_attempts=attempts,
        max_together=together,
    )
    return scheduler, rows


def lease_all(scheduler: Scheduler) -> list:
    leases = []
    while (lease := scheduler.lease()) is not None:
        leases.append(lease)
    return leases


def load_all(scheduler: Scheduler) -> None:
    for lease in lease_all(scheduler):
        scheduler.loaded(lease, 10)

"""Tests the line that names the bottleneck: the verdict on where items are, and the real scheduler's queue depths."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.execution.lease import QueueDepths
from pipeline.execution.reporting.progress import Bottleneck, Progress, limit_at
from pipeline.execution.reporting.summary import RunStats
from pipeline.execution.scheduler import Scheduler
from pipeline.records import MediaItem, Shard

IDLE = QueueDepths(num_loading=0, num_loaded=0, num_running=0, num_unpublished=0, capacity=8)


@pytest.mark.parametrize(
    ("depths", "limit"),
    [
        ({"num_loading": 4, "num_loaded": 3, "num_running": 8}, "model"),
        ({"num_loading": 4, "num_running": 8}, "model"),  # its batch is full, though nothing waits just now
        ({"num_loading": 4, "num_loaded": 2, "capacity": 0}, "model"),  # it is still loading its weights
        ({"num_loading": 4, "num_running": 5}, "readers"),
        ({"num_loading": 4}, "readers"),
        ({"num_loading": 4, "capacity": 0}, "readers"),
        ({"num_running": 2}, "model"),  # the last items
        ({"num_unpublished": 3}, "store"),
        ({"num_loading": 1, "num_unpublished": 3}, "readers"),
        ({}, None),
        ({"num_loading": 4, "capacity": None}, None),  # the local executor: one process alternates
    ],
)
def test_where_the_items_are_names_what_holds_them_up(depths, limit) -> None:
    assert limit_at(replace(IDLE, **depths)) == limit


def row(**seconds):
    return SimpleNamespace(**{"fetch_s": 0.0, "load_s": 0.0, "preprocess_s": 0.0, **seconds})


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ({"fetch_s": 0.1, "load_s": 0.3}, "waits for the readers (75%)"),
        ({"fetch_s": 0.3, "load_s": 0.1, "preprocess_s": 0.1}, "waits for the store (fetching) (75%)"),
    ],
)
def test_readers_that_mostly_fetch_wait_for_the_store(seconds, said) -> None:
    bottleneck = Bottleneck()
    assert bottleneck.verdict() == ""
    bottleneck.observe(replace(IDLE, num_loading=2), 3.0)
    bottleneck.observe(replace(IDLE, num_running=8), 1.0)
    bottleneck.add(row(**seconds))
    assert bottleneck.verdict() == said
    assert bottleneck.verdict() == "", "each verdict is of its own time"


def test_the_scheduler_says_where_its_items_are() -> None:
    items = tuple(MediaItem(f"item-{n}", (f"{n}.mp4",), "video", (1,), ("",)) for n in range(6))
    scheduler = Scheduler(
        range(2),
        lambda index: Shard(index, items[:4] if index == 0 else items[4:]),
        estimate_bytes=lambda item: 1,
        failed_row=lambda *_: None,
        on_row=lambda row: None,
        max_inflight_bytes=100,
        max_open_shards=2,
        max_attempts=1,
    )
    leases = [scheduler.lease() for _ in range(6)]
    for lease in leases[:5]:
        scheduler.loaded(lease, 1)
    scheduler.assign("one", 4)
    for lease in leases[:4]:
        scheduler.finished("one", SimpleNamespace(item_id=lease.item.item_id))
    scheduler.assign("one", 1)
    assert scheduler.queue_depths(capacity=8) == QueueDepths(1, 0, 1, 1, 8)


def test_the_line_names_it(monkeypatch, caplog) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr("pipeline.execution.reporting.progress.time", SimpleNamespace(monotonic=lambda: clock.now_s))
    progress = Progress(10, RunStats(), terminal=False)
    caplog.set_level("INFO", "pipeline")
    for clock.now_s in range(1, 31):
        progress.tick(lambda: replace(IDLE, num_loaded=1))
    [line] = caplog.messages
    assert line == "0/10 items after 30 s; waits for the model (100%)"

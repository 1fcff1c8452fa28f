"""The scheduling core alone: no Ray, no media, no model. Rows are stood in for by (item_id, error) tuples."""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import pytest

from pipeline.errors import ItemError
from pipeline.records import MediaItem, Shard
from pipeline.scheduler import Scheduler


class Row(NamedTuple):
    item_id: str
    error_type: str | None = None


def make(
    num_shards: int = 2, per_shard: int = 3, *, inflight: int = 100, open_shards: int = 4, attempts: int = 3
) -> tuple[Scheduler, list[Row]]:
    def shard(index: int) -> Shard:
        ids = range(index * per_shard, (index + 1) * per_shard)
        return Shard(index, tuple(MediaItem(f"i{n:04}", (f"{n}.mp4",), "video", (1,), ("",)) for n in ids))

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


def test_rows_of_a_shard_come_complete_once_and_in_the_order_of_its_items() -> None:
    scheduler, _ = make()
    load_all(scheduler)
    held = scheduler.assign("a", 6)
    for lease in reversed(held):
        scheduler.finished("a", Row(lease.item.item_id))
    complete = scheduler.take_complete()
    assert [(index, [row.item_id for row in rows]) for index, rows in complete] == [
        (1, ["i0003", "i0004", "i0005"]),
        (0, ["i0000", "i0001", "i0002"]),
    ]
    assert scheduler.take_complete() == []
    assert not scheduler.done, "a shard is done when it is published, not when its rows are there"
    for index, _rows in complete:
        scheduler.published(index)
    assert scheduler.done
    assert scheduler.inflight_bytes == 0


def test_no_barrier_between_shards() -> None:
    scheduler, _ = make(num_shards=2, per_shard=2)
    load_all(scheduler)
    first, *_ = scheduler.assign("a", 4)
    assert {lease.shard_index for lease in scheduler._running["a"].values()} == {0, 1}
    scheduler.finished("a", Row(first.item.item_id))
    assert scheduler.num_running("a") == 3


def test_bytes_in_flight_are_bounded_by_the_estimate_then_by_the_truth() -> None:
    scheduler, _ = make(inflight=25)
    first, second = lease_all(scheduler)
    assert scheduler.inflight_bytes == 20
    scheduler.loaded(first, 4)
    assert scheduler.inflight_bytes == 14
    assert scheduler.lease() is not None
    scheduler.loaded(second, 10)
    scheduler.assign("a", 2)
    assert scheduler.lease() is None
    scheduler.finished("a", Row(first.item.item_id))
    scheduler.finished("a", Row(second.item.item_id))
    assert scheduler.inflight_bytes == 10


def test_one_item_larger_than_the_bound_is_let_through_alone() -> None:
    scheduler, _ = make(inflight=5)
    assert len(lease_all(scheduler)) == 1


def test_open_shards_are_bounded_stragglers_and_unpublished_included() -> None:
    scheduler, _ = make(num_shards=5, per_shard=1, open_shards=2)
    load_all(scheduler)
    assert scheduler.num_open_shards == 2
    straggler, quick = scheduler.assign("a", 2)
    scheduler.finished("a", Row(quick.item.item_id))
    [(index, _rows)] = scheduler.take_complete()
    assert scheduler.lease() is None, "not yet published"
    scheduler.published(index)
    assert scheduler.lease() is not None
    assert straggler.phase == "running"


def test_a_retryable_failure_is_tried_again_and_then_becomes_a_row() -> None:
    scheduler, rows = make(num_shards=1, per_shard=1, attempts=3)
    for attempt in (1, 2, 3):
        lease = scheduler.lease()
        assert lease.attempts == attempt
        scheduler.not_loaded(lease, ItemError("store_error", "503", retryable=True))
    assert rows == [Row("i0000", "store_error")]
    assert scheduler.lease() is None


def test_a_final_failure_is_not_tried_again_and_leaves_neighbours_alone() -> None:
    scheduler, rows = make(num_shards=1, per_shard=2)
    bad, good = lease_all(scheduler)
    scheduler.not_loaded(bad, ItemError("corrupt_media", "no moov"))
    scheduler.loaded(good, 10)
    scheduler.assign("a", 1)
    scheduler.finished("a", Row(good.item.item_id))
    assert rows == [Row("i0000", "corrupt_media"), Row("i0001")]
    assert [index for index, _ in scheduler.take_complete()] == [0]


def test_only_a_lost_workers_items_are_started_again() -> None:
    scheduler, rows = make()
    load_all(scheduler)
    mine, others = scheduler.assign("a", 2), scheduler.assign("b", 4)
    scheduler.worker_lost("a")
    assert [lease.attempts for lease in mine] == [2, 2]
    assert [lease.attempts for lease in others] == [1, 1, 1, 1]
    assert all(lease.phase == "running" for lease in others)
    assert rows == []


def test_suspects_run_alone_and_the_killer_is_found_while_its_neighbours_get_their_rows() -> None:
    scheduler, rows = make(num_shards=4, per_shard=4)
    poison, restarts = "i0005", 0
    while not scheduler.done:
        load_all(scheduler)
        worker = f"a{restarts}"
        scheduler.assign(worker, 8)
        held = dict(scheduler._running[worker])
        if any(lease.suspect for lease in held.values()):
            assert len(held) == 1, "a suspect has the worker to itself"
            assert scheduler.assign(worker, 8) == [], "also against those that are loaded and waiting"
        if poison in held:
            scheduler.worker_lost(worker)
            restarts += 1
        else:
            for item_id in held:
                scheduler.finished(worker, Row(item_id))
        for index, _rows in scheduler.take_complete():
            scheduler.published(index)
    assert Counter(row.item_id for row in rows) == {f"i{n:04}": 1 for n in range(16)}
    assert [row for row in rows if row.error_type] == [Row(poison, "worker_died")]
    assert restarts == 3, "once in a crowd, twice alone"


def test_an_item_that_kills_its_reader_twice_becomes_a_row_and_those_queued_behind_it_do_not() -> None:
    scheduler, rows = make(num_shards=1, per_shard=3)
    killer, behind, other = lease_all(scheduler)
    scheduler.loaded(other, 10)
    scheduler.reader_lost([killer, behind])
    assert rows == []
    assert scheduler.lease(idle=False) is None, "suspects get a reader to themselves"
    for _ in range(2):
        assert scheduler.lease() is killer
        scheduler.reader_lost([killer])
    assert rows == [Row("i0000", "worker_died")]
    assert scheduler.lease() is behind
    scheduler.loaded(behind, 10)
    assert len(scheduler.assign("a", 5)) == 2


def test_a_payload_lost_with_its_node_is_loaded_again() -> None:
    scheduler, rows = make(num_shards=1, per_shard=1)
    load_all(scheduler)
    [lease] = scheduler.assign("a", 1)
    lease.payload = "handle"
    scheduler.payload_lost(lease)
    assert scheduler.inflight_bytes == 0
    assert scheduler.lease() is lease
    assert lease.payload is None
    assert rows == []


@pytest.mark.parametrize("seed", range(20))
def test_random_faults_lose_nothing_and_double_nothing(seed: int) -> None:
    """Random loads, deaths and answers in random order: every item gets one row, all bounds hold, all ends."""
    draw = random.Random(seed)
    scheduler, rows = make(num_shards=6, per_shard=5, inflight=draw.choice([15, 60, 1000]), open_shards=3)
    loading: list = []
    workers = ["a", "b"]
    for _ in range(100_000):
        if scheduler.done:
            break
        if (lease := scheduler.lease()) is not None:
            loading.append(lease)
        if loading and draw.random() < 0.7:
            lease = loading.pop(draw.randrange(len(loading)))
            if draw.random() < 0.1:
                scheduler.not_loaded(lease, ItemError("store_error", "", retryable=draw.random() < 0.8))
            elif draw.random() < 0.05:
                scheduler.reader_lost([lease])
            else:
                scheduler.loaded(lease, draw.randint(1, 10))
        worker = draw.choice(workers)
        scheduler.assign(worker, 4 - scheduler.num_running(worker))
        held = list(scheduler._running[worker])
        if held and draw.random() < 0.05:
            scheduler.worker_lost(worker)
            workers[workers.index(worker)] = f"{worker}'"
        elif held:
            scheduler.finished(worker, Row(draw.choice(held)))
        for index, complete in scheduler.take_complete():
            assert [row.item_id for row in complete] == [f"i{n:04}" for n in range(index * 5, index * 5 + 5)]
            scheduler.published(index)
        assert scheduler.num_open_shards <= 3
    assert scheduler.done
    assert scheduler.inflight_bytes == 0
    assert Counter(row.item_id for row in rows) == {f"i{n:04}": 1 for n in range(30)}


def test_what_does_not_come_back_is_tried_once_more_alone_and_its_neighbours_are_not_charged() -> None:
    scheduler, rows = make(num_shards=1, per_shard=3)
    load_all(scheduler)
    scheduler.assign("a", 3)
    scheduler.worker_lost("a", "too late", timed_out=True)
    assert rows == []
    for worker in ("b", "c", "d"):
        [lease] = scheduler.assign(worker, 3)
        if lease.item.item_id == "i0001":
            scheduler.worker_lost(worker, "too late", timed_out=True)
        else:
            scheduler.finished(worker, Row(lease.item.item_id))
    assert [row for row in rows if row.error_type] == [Row("i0001", "item_timeout")]
    assert len(rows) == 3


def test_one_attempt_is_one_attempt() -> None:
    scheduler, rows = make(num_shards=1, per_shard=1, attempts=1)
    load_all(scheduler)
    scheduler.assign("a", 1)
    scheduler.worker_lost("a", "too late", timed_out=True)
    assert rows == [Row("i0000", "item_timeout")]

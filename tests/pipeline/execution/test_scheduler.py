"""Tests the scheduler alone: what is loaded, what goes to whom, when a shard is complete. No Ray, no model."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from pipeline.errors import ItemError
from pipeline.execution.lease import Lease
from pipeline.records import MediaItem
from tests.support.runs.scheduling import Row, lease_all, load_all, make


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


@pytest.mark.parametrize("per_medium", [1, 2, 5])
@pytest.mark.parametrize("seed", range(20))
def test_random_faults_lose_nothing_and_double_nothing(seed: int, per_medium: int) -> None:
    """Random loads, deaths and answers in random order: every item gets one row, all bounds hold, all ends."""
    draw = random.Random(seed)
    inflight = draw.choice([15, 60, 1000])
    scheduler, rows = make(6, 5, inflight=inflight, open_shards=3, per_medium=per_medium, together=4)
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
        given = scheduler.assign(worker, 4 - scheduler.num_running(worker))
        if given and draw.random() < 0.1:
            scheduler.payloads_lost(given)
        held = list(scheduler._running[worker])
        if held and draw.random() < 0.07:
            draw.choice([scheduler.worker_lost, scheduler.worker_lost, scheduler.worker_released])(worker)
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


def test_neighbours_on_one_medium_are_one_load_and_go_to_one_worker() -> None:
    scheduler, _ = make(num_shards=1, per_shard=6, inflight=25, per_medium=3, together=8)
    first, second = lease_all(scheduler)
    assert [[one.item.item_id for one in lease.group] for lease in (first, second)] == [
        ["i0000", "i0001", "i0002"],
        ["i0003", "i0004", "i0005"],
    ]
    assert scheduler.inflight_bytes == 20, "a medium counts once, however many ask about it"
    for lease in (first, second):
        lease.payload = lease.item.uris
        scheduler.loaded(lease, 7)
    given = scheduler.assign("a", 1)
    assert given == list(first.group), "all of them, though the capacity is one"
    assert {lease.payload for lease in given} == {("0.mp4",)}
    assert [lease.item.item_id for lease in scheduler.assign("b", 1)] == ["i0003", "i0004", "i0005"]
    for n in (0, 1, 2):
        assert scheduler.inflight_bytes == 14, "the medium is there until the last of them has its row"
        scheduler.finished("a", Row(f"i{n:04}"))
    assert scheduler.inflight_bytes == 7


def test_so_many_go_together_and_no_more_and_another_version_is_another_medium() -> None:
    scheduler, _ = make(num_shards=1, per_shard=5, per_medium=5, together=2)
    assert [len(lease.group) for lease in lease_all(scheduler)] == [2, 2, 1]
    one, same, newer = (
        MediaItem(str(n), ("0.mp4",), "video", (1,), (etag,)) for n, etag in enumerate(("old", "old", "new"))
    )
    assert Lease(one, 0).has_same_media_as(Lease(same, 0))
    assert not Lease(one, 0).has_same_media_as(Lease(newer, 0))


def test_a_failed_load_is_each_items_own_failed_row_after_its_own_tries() -> None:
    scheduler, rows = make(num_shards=1, per_shard=4, per_medium=2, together=4, attempts=2)
    broken, other = lease_all(scheduler)
    scheduler.not_loaded(broken, ItemError("store_error", "503", retryable=True))
    assert rows == []
    assert scheduler.inflight_bytes == 10
    again = scheduler.lease()
    assert again is broken, "they wait side by side and are loaded together again"
    assert [(one.item.item_id, one.attempts) for one in again.group] == [("i0000", 2), ("i0001", 2)]
    scheduler.not_loaded(again, ItemError("store_error", "503", retryable=True))
    assert rows == [Row("i0000", "store_error"), Row("i0001", "store_error")]
    scheduler.not_loaded(other, ItemError("corrupt_media", ""))
    assert [index for index, _ in scheduler.take_complete()] == [0]
    assert scheduler.inflight_bytes == 0

"""Tests the scheduler when readers, workers and media are lost: who is tried again, who alone, and who fails."""

from __future__ import annotations

from collections import Counter

from tests.support.runs.scheduling import Row, lease_all, load_all, make


def test_only_a_lost_workers_items_are_started_again() -> None:
    scheduler, rows = make()
    load_all(scheduler)
    mine, others = scheduler.assign("a", 2), scheduler.assign("b", 4)
    scheduler.worker_lost("a")
    assert [lease.attempts for lease in mine] == [2, 2]
    assert [lease.attempts for lease in others] == [1, 1, 1, 1]
    assert all(lease.phase == "running" for lease in others)
    assert rows == []


def test_quarantined_items_run_alone_and_the_killer_is_found_while_its_neighbours_get_their_rows() -> None:
    scheduler, rows = make(num_shards=4, per_shard=4)
    poison, restarts = "i0005", 0
    while not scheduler.done:
        load_all(scheduler)
        worker = f"a{restarts}"
        scheduler.assign(worker, 8)
        held = dict(scheduler._running[worker])
        if any(lease.quarantined for lease in held.values()):
            assert len(held) == 1, "a quarantined item has the worker to itself"
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
    assert scheduler.lease(idle=False) is None, "quarantined items get a reader to themselves"
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
    scheduler.payloads_lost([lease])
    assert scheduler.inflight_bytes == 0
    assert scheduler.lease() is lease
    assert lease.payload is None
    assert rows == []


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


def test_a_medium_that_kills_its_reader_twice_fails_all_who_ask_about_it_and_nobody_else() -> None:
    scheduler, rows = make(num_shards=1, per_shard=4, per_medium=2, together=4)
    killer, behind = lease_all(scheduler)
    scheduler.reader_lost([killer, behind])
    for _ in range(2):
        assert scheduler.lease() is killer
        scheduler.reader_lost([killer])
    assert sorted(rows) == [Row("i0000", "worker_died"), Row("i0001", "worker_died")]
    assert scheduler.lease() is behind


def test_a_poison_question_is_found_among_harmless_ones_on_the_same_medium() -> None:
    scheduler, rows = make(num_shards=1, per_shard=3, per_medium=3, together=4)
    load_all(scheduler)
    deaths = 0
    while not scheduler.take_complete():
        worker = f"a{deaths}"
        held = [lease.item.item_id for lease in scheduler.assign(worker, 3)]
        assert len(held) == (3 if deaths == 0 else 1)
        if "i0001" in held:
            scheduler.worker_lost(worker)
            deaths += 1
        else:
            scheduler.finished(worker, Row(held[0]))
    assert sorted(rows) == [Row("i0000"), Row("i0001", "worker_died"), Row("i0002")]
    assert deaths == 3
    assert scheduler.inflight_bytes == 0


def test_a_shared_payload_lost_with_its_node_is_loaded_once_more_for_all() -> None:
    scheduler, _ = make(num_shards=1, per_shard=3, per_medium=3, together=4)
    load_all(scheduler)
    scheduler.payloads_lost(scheduler.assign("a", 3))
    assert scheduler.inflight_bytes == 0
    [lease] = lease_all(scheduler)
    assert len(lease.group) == 3


def test_media_that_are_lost_each_time_are_a_row_after_as_many_tries_as_any_failure() -> None:
    scheduler, rows = make(num_shards=1, per_shard=1, attempts=3)
    for attempt in (1, 2, 3):
        assert rows == []
        load_all(scheduler)
        [lease] = scheduler.assign("a", 1)
        assert lease.attempts == attempt
        scheduler.payloads_lost([lease])
    assert rows == [Row("i0000", "media_lost")]
    assert [index for index, _ in scheduler.take_complete()] == [0]
    assert scheduler.inflight_bytes == 0


def test_lost_media_fail_only_the_item_that_lost_them_alone() -> None:
    scheduler, rows = make(num_shards=1, per_shard=3, attempts=2)
    calls = []
    while len(rows) < 3:
        assert len(calls) < 10, "endless"
        load_all(scheduler)
        calls.append(given := scheduler.assign("a", 3))
        if any(lease.item.item_id == "i0001" for lease in given):
            scheduler.payloads_lost(given)
        else:
            scheduler.finished("a", Row(given[0].item.item_id))
    assert [len(given) for given in calls] == [3, 3, 1, 1, 1], "when their tries are used up, each has one alone"
    assert sorted(rows) == [Row("i0000"), Row("i0001", "media_lost"), Row("i0002")]


def test_items_of_a_released_worker_are_not_quarantined_and_lose_no_try() -> None:
    scheduler, rows = make(num_shards=1, per_shard=2, attempts=1)
    load_all(scheduler)
    given = scheduler.assign("a", 2)
    scheduler.worker_released("a")
    assert scheduler.inflight_bytes == 0
    assert lease_all(scheduler) == given
    for lease in given:
        scheduler.loaded(lease, 10)
    assert scheduler.assign("b", 2) == given
    assert rows == []


def test_a_quarantined_item_shares_no_load_of_one_that_is_not() -> None:
    """Otherwise it would be loaded by a reader that holds other items, which would fall with it."""
    scheduler, _ = make(num_shards=1, per_shard=4, per_medium=4, together=3)
    killer, innocent = lease_all(scheduler)
    scheduler.loaded(innocent, 10)
    given = scheduler.assign("a", 1)
    scheduler.reader_lost([killer])
    scheduler.payloads_lost(given)
    assert scheduler.lease(idle=False) is innocent
    assert innocent.shared_load_items == ()
    assert scheduler.lease(idle=False) is None
    assert scheduler.lease() is killer
    assert len(killer.group) == 3

"""Tests how many actors are requested: one of each kind first, the rest when both have a place; and what ends a job."""

from __future__ import annotations

import pytest

from pipeline.errors import ClusterError
from pipeline.execution.ray.actor_pool import (
    RELEASE_AFTER_S,
    START_TIMEOUT_S,
    ActorPoolAutoscaler,
    CircuitBreaker,
    PoolState,
    ReaderHandle,
    ScaleDecision,
    VLMHandle,
)

NOTHING = ScaleDecision()


@pytest.mark.parametrize(
    ("vlms", "readers", "lacking_s", "for_vlms", "for_readers"),
    [
        (PoolState(0, 0, 8), PoolState(0, 0, 2), 0, ScaleDecision(add=1), ScaleDecision(add=1)),
        (PoolState(0, 1, 8), PoolState(0, 1, 2), 0, NOTHING, NOTHING),
        (PoolState(1, 0, 8), PoolState(0, 1, 2), 0, NOTHING, NOTHING),
        (PoolState(1, 0, 8), PoolState(1, 0, 2), 0, ScaleDecision(add=7), ScaleDecision(add=1)),
        (PoolState(2, 6, 8), PoolState(2, 0, 2), 0, NOTHING, NOTHING),
        (PoolState(1, 6, 8), PoolState(2, 0, 2), 0, ScaleDecision(add=1), NOTHING),  # one died
        # or they would take the place of the only reader
        (PoolState(3, 5, 8), PoolState(0, 0, 2), 0, ScaleDecision(cancel=5), ScaleDecision(add=1)),
        (PoolState(0, 3, 8), PoolState(1, 0, 2), 0, ScaleDecision(cancel=2), NOTHING),
        (PoolState(3, 0, 8), PoolState(0, 1, 2), RELEASE_AFTER_S, ScaleDecision(release=True), NOTHING),
        (PoolState(0, 1, 8), PoolState(2, 0, 2), RELEASE_AFTER_S, NOTHING, ScaleDecision(release=True)),
        (PoolState(1, 0, 8), PoolState(0, 1, 2), RELEASE_AFTER_S, NOTHING, NOTHING),
    ],
)
def test_what_is_requested(vlms, readers, lacking_s, for_vlms, for_readers) -> None:
    autoscaler = ActorPoolAutoscaler(1, now_s=100.0)
    assert autoscaler.decide(vlms, readers, now_s=100.0 + lacking_s) == (for_vlms, for_readers)


def test_one_at_a_time_is_released_and_only_while_one_kind_lacks() -> None:
    """Would fail if the time counted from the start of the job, or did not count again from each release."""
    autoscaler = ActorPoolAutoscaler(1, now_s=0.0)
    both, lost = (PoolState(3, 0, 3), PoolState(1, 0, 1)), (PoolState(3, 0, 3), PoolState(0, 1, 1))
    assert autoscaler.decide(*both, now_s=100.0) == (NOTHING, NOTHING)
    released_at_s = []
    for now_s in range(101, 150):
        for_vlms, _ = autoscaler.decide(*lost, now_s=float(now_s))
        if for_vlms.release:
            autoscaler.released(now_s=float(now_s))
            released_at_s.append(now_s)
    assert released_at_s == [115, 130, 145]


@pytest.mark.parametrize("places", range(2, 8))
@pytest.mark.parametrize("greedy_first", [0, 1])
def test_work_starts_on_any_cluster_with_two_places_whoever_is_placed_first(places, greedy_first) -> None:
    """The cluster gives every free place to one kind; the other kind still gets its first place."""
    pools, autoscaler = [PoolState(0, 0, 5), PoolState(0, 0, 4)], ActorPoolAutoscaler(1, now_s=0.0)
    for _ in range(10):
        for n, step in enumerate(autoscaler.decide(*pools, now_s=0.0)):
            pools[n] = PoolState(
                pools[n].num_placed, pools[n].num_waiting + step.add - step.cancel, pools[n].max_actors
            )
        for n in (greedy_first, 1 - greedy_first):
            free = places - sum(pool.num_placed for pool in pools)
            taken = min(free, pools[n].num_waiting)
            pools[n] = PoolState(pools[n].num_placed + taken, pools[n].num_waiting - taken, pools[n].max_actors)
    assert all(pool.num_placed for pool in pools)
    assert sum(pool.num_placed for pool in pools) == places


def test_a_pool_is_counted_from_its_handles() -> None:
    started, placed = VLMHandle("a", None, placed=True, started=True), VLMHandle("b", None, placed=True)
    assert PoolState.of([started, placed, VLMHandle("c", None)], 4) == PoolState(2, 1, 4, num_started=1)
    busy = ReaderHandle(None, placed=True, started=True, queue=[object()])
    assert [handle.releasable for handle in (busy, ReaderHandle(None, placed=True), ReaderHandle(None))] == [
        False,
        True,
        False,
    ]


def test_too_few_actors_are_said_now_and_then_and_end_the_job_when_it_lasts() -> None:
    autoscaler = ActorPoolAutoscaler(2, now_s=0.0)
    reader = PoolState(1, 0, 1, num_started=1)

    def check(num_vlms: int, now_s: float) -> str:
        vlms = PoolState(num_vlms, 0, 2, num_started=num_vlms)
        return autoscaler.waiting_message(vlms, reader, resources=lambda: "2 CPU", now_s=now_s)

    said = [check(1, float(now_s)) for now_s in range(100)]
    assert [now_s for now_s, line in enumerate(said) if line] == [30, 60, 90]
    assert "1 VLM actors of at least 2" in said[30]
    assert check(2, START_TIMEOUT_S) == ""
    with pytest.raises(ClusterError, match=r"num_vlm_actors\.min"):
        check(1, 2 * START_TIMEOUT_S)


@pytest.mark.parametrize(("while_starting", "num_actors", "most"), [(False, 1, 8), (False, 4, 12), (True, 1, 4)])
def test_deaths_in_a_row_end_the_job_and_a_success_begins_the_count_again(while_starting, num_actors, most) -> None:
    breaker = CircuitBreaker("the readers", num_actors)
    for _ in range(most - 1):
        breaker.record_death(RuntimeError("gone"), while_starting=while_starting)
    breaker.record_success()
    for _ in range(most - 1):
        breaker.record_death(RuntimeError("gone"), while_starting=while_starting)
    with pytest.raises(ClusterError, match=f"the readers died {most} times in a row.*gone"):
        breaker.record_death(RuntimeError("gone"), while_starting=while_starting)

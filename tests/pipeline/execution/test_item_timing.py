"""Tests a row's seconds on the driver's clock, with clocks of our own that differ from host to host."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from illava.requests import Generation, Timing, TokenUsage
from pipeline.execution import item_timing
from pipeline.execution.item_timing import ItemTimeline, ModelGaps, loaded_together
from pipeline.execution.ray.actors import StepResult
from pipeline.execution.ray.executor import RayExecutor
from pipeline.execution.rows import RowMaker, RunInfo
from pipeline.execution.scheduler import Scheduler
from pipeline.execution.worker import WorkerUsage
from pipeline.loading.load_report import LoadReport
from pipeline.records import LoadStats, MediaItem, ResultRow, Shard
from tests.support.runs.actors_without_ray import Answer, Cluster
from tests.support.runs.fakes import FakeLoader, job_config

STAGES = ("fetch_s", "load_s", "preprocess_s", "queue_s", "vision_s", "prefill_s", "decode_s")
STATS = LoadStats(1.0, 2.0, 0.5)
TIMINGS = (Timing(0.25, 1.0, 2.0, 4.0, 5.0),)
SECONDS = st.floats(0.0, 100.0)


class Clock:
    """Shows the time of the host it is `on`; the hosts' clocks have nothing to do with each other."""

    now_s, skew_s = 1000.0, 0.0

    def perf_counter(self) -> float:
        return self.now_s + self.skew_s

    @contextmanager
    def on(self, skew_s: float):
        self.skew_s = skew_s
        yield
        self.skew_s = 0.0


@pytest.fixture(scope="module")
def clock():
    with pytest.MonkeyPatch.context() as patch:
        fake = Clock()
        patch.setattr(item_timing, "time", fake)
        yield fake


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> RowMaker:
    return RowMaker(job_config(tmp_path_factory.mktemp("job"), {"uri": "x/"}), RunInfo("r", "f"))


def made_row(rows: RowMaker, timings=TIMINGS, *, stats=STATS, failed=()):
    """As a worker makes it, before its timeline is written into it."""
    loaded = replace(FakeLoader().load(MediaItem("item-1", ("1.mp4",), "video", (1,), ("",))), stats=stats)
    answers = [answer(timing, failed=n in failed) for n, timing in enumerate(timings)]
    return rows.answered(loaded, answers, attempts=1, shard_index=0)


def answer(timing: Timing, *, failed: bool = False) -> Generation:
    if failed:
        return Generation("item-1", "", (), None, None, timing, error=ValueError("of this request alone"))
    return Generation("item-1", "1", (1,), "stop", TokenUsage(1, 1, 1, 1, 1, 1, 1), timing)


def stages_s(row) -> float:
    return sum(getattr(row, name) for name in STAGES)


def test_every_wait_counts_as_queue_and_the_stages_sum_to_the_latency(clock, rows) -> None:
    timeline = ItemTimeline()
    clock.now_s += 5.5  # a load of 3.5 s behind another of 2 s
    timeline.loaded(3.5, STATS)
    clock.now_s += 10.0  # loaded, waiting for a worker
    timeline.dispatched()
    clock.now_s += 3.0 + 7.25 + 0.75  # mailbox, worker, rest of the call that brings the row
    row = timeline.finalize(replace(made_row(rows), latency_s=7.25), held_s=8.0)
    assert row.latency_s == pytest.approx(5.5 + 10.0 + 3.0 + 7.25), "ends with the item, not with its call"
    assert row.queue_s == pytest.approx(0.25 + 2.0 + 10.0 + 3.0)
    assert stages_s(row) == pytest.approx(row.latency_s)


def test_time_that_no_stage_measured_shows_as_a_difference(clock, rows) -> None:
    """The sum is a measurement, not an identity: a reader that takes 4 s longer than its stages say is seen."""
    timeline = ItemTimeline()
    clock.now_s += 7.5
    timeline.loaded(7.5, STATS)
    timeline.dispatched()
    clock.now_s += 7.25
    row = timeline.finalize(replace(made_row(rows), latency_s=7.25), held_s=7.25)
    assert row.latency_s - stages_s(row) == pytest.approx(4.0)


@dataclass(frozen=True)
class Way:
    """Describes what an item goes through, in seconds.

    Attributes:
        waits_s: waits before the load, after it, in the mailbox, in the call that brings the row, and until the driver
            sees the row.
        with_the_dead_s: time in workers that died of another item.
        requests: time before each request and after its failure; the engine's seconds; whether the request fails.
        shares_load: a neighbour's load brought its media.
        skew_s: the worker's clock, less the driver's.
    """

    waits_s: tuple[float, float, float, float, float]
    with_the_dead_s: list[float]
    requests: list[tuple[float, Timing, bool]]
    shares_load: bool
    skew_s: float

    @property
    def failed(self) -> set[int]:
        return {n for n, (_, _, failed) in enumerate(self.requests) if failed}


WAYS = st.builds(
    Way,
    st.tuples(*[SECONDS] * 5),
    st.lists(SECONDS, max_size=2),
    st.lists(st.tuples(SECONDS, st.builds(Timing, *[SECONDS] * 5), st.booleans()), min_size=1, max_size=4),
    st.booleans(),
    st.floats(-1e4, 1e4),
)


@given(way=WAYS)
def test_on_any_way_each_second_is_in_one_stage(clock, rows, way) -> None:
    before_load_s, loaded_s, mailbox_s, rest_of_call_s, unseen_s = way.waits_s
    load_s = STATS.fetch_s + STATS.load_s + STATS.preprocess_s
    began_s, timeline, neighbour = clock.now_s, ItemTimeline(), ItemTimeline()
    clock.now_s += before_load_s + load_s
    loaded_together([neighbour, timeline] if way.shares_load else [timeline, neighbour], load_s, STATS)
    clock.now_s += loaded_s
    timeline.dispatched()
    for dead_s in way.with_the_dead_s:
        clock.now_s += dead_s
        timeline.dispatched()
    clock.now_s += mailbox_s
    with clock.on(way.skew_s):
        taken_s, inner = clock.now_s, ItemTimeline()
        for n, (beside_s, timing, failed) in enumerate(way.requests):
            if n:
                clock.now_s += beside_s  # neighbours are looked after, then the next request is made
                inner.dispatched()
            ended_s = clock.now_s + timing.queue_s + timing.vision_s + timing.prefill_s + timing.decode_s
            clock.now_s = ended_s + (beside_s if failed else 0.0)  # the step goes on for its neighbours' sake
            inner.answered(answer(timing, failed=failed), step_end_s=clock.perf_counter())
        stats = STATS.of_shared_load() if way.shares_load else STATS
        row = made_row(rows, [timing for _, timing, _ in way.requests], stats=stats, failed=way.failed)
        row = inner.written_to(row)
        assert row.latency_s == pytest.approx(ended_s - taken_s, abs=1e-6)
    clock.now_s += rest_of_call_s
    held_s = clock.now_s - taken_s
    clock.now_s += unseen_s
    row = timeline.finalize(row, held_s)
    assert row.latency_s == pytest.approx(ended_s + unseen_s - began_s, abs=1e-6)
    assert stages_s(row) == pytest.approx(row.latency_s, abs=1e-6)


@pytest.mark.parametrize("reached", ["reader", "queue", "worker"])
@pytest.mark.parametrize("shares_load", [False, True])
def test_a_row_that_no_worker_made_has_all_its_seconds_too(clock, rows, reached, shares_load) -> None:
    began_s, timeline = clock.now_s, ItemTimeline()
    clock.now_s += 2.0 + 3.5
    if reached != "reader":
        loaded_together([ItemTimeline(), timeline] if shares_load else [timeline], 3.5, STATS)
        clock.now_s += 4.0
    if reached == "worker":
        timeline.dispatched()
        clock.now_s += 8.0
    item = MediaItem("item-1", ("1.mp4",), "video", (1,), ("",))
    failed = rows.failed(item, "worker_died", "gone", attempts=2, shard_index=0, stats=timeline.stats)
    row = timeline.finalize_failed(failed)
    assert row.latency_s == pytest.approx(clock.now_s - began_s)
    loaded_s = 3.5 if reached != "reader" and not shares_load else 0.0
    assert row.queue_s == pytest.approx(row.latency_s - loaded_s)
    assert stages_s(row) == pytest.approx(row.latency_s)


def test_the_wait_for_a_model_is_the_part_of_the_wait_without_any(clock) -> None:
    gaps, began_s = ModelGaps(), clock.now_s
    for seconds, is_loaded in ((10, True), (5, True), (5, False), (2, False), (3, True)):
        clock.now_s += seconds
        gaps.note(is_loaded=is_loaded)
    assert gaps.within(began_s, clock.now_s) == pytest.approx(10 + 2 + 3)
    assert gaps.within(began_s + 4, began_s + 12) == pytest.approx(6)
    assert gaps.within(began_s + 11, began_s + 19) == 0
    assert gaps.within(began_s + 21, began_s + 22) == pytest.approx(1)
    gaps.note(is_loaded=False)
    clock.now_s += 7
    assert gaps.within(clock.now_s - 4, clock.now_s) == pytest.approx(4), "one that goes on"


class LoadsItsModelLast(Cluster):
    """Holds the answer of every VLM actor's start back until the test lets it go."""

    def __init__(self, clock: Clock, row: ResultRow) -> None:
        super().__init__()
        self._clock, self._row, self.is_loaded, self._starts = clock, row, False, []

    def spawn_vlm(self, config, make_worker):
        actor = super().spawn_vlm(config, make_worker)
        actor.start = SimpleNamespace(remote=self._start)
        actor.advance = SimpleNamespace(remote=self._advance)
        return actor

    def _advance(self, inputs, *payloads) -> Answer:
        self._clock.now_s += 2.0 + 7.25  # its mailbox, then the worker
        return Answer(StepResult(tuple((self._row, 7.25) for _ in inputs), WorkerUsage()))

    def _start(self) -> Answer:
        self._starts.append(Answer(1))
        return self._starts[-1]

    def load(self, reader, item: MediaItem):
        self._clock.now_s += 3.5
        return Answer(LoadReport(3.5, STATS, nbytes=10)), object()

    def wait(self, references, timeout_s):
        return [one for one in references if self.is_loaded or one not in self._starts]


def test_a_row_says_how_long_it_waited_for_the_model_to_be_loaded(clock, rows, tmp_path) -> None:
    item = MediaItem("item-1", ("1.mp4",), "video", (1,), ("",))
    cluster, made = LoadsItsModelLast(clock, replace(made_row(rows), latency_s=7.25)), []
    scheduler = Scheduler(
        [0],
        lambda index: Shard(index, (item,)),
        estimate_bytes=lambda item: 10,
        failed_row=lambda *_: pytest.fail("nothing fails"),
        on_row=made.append,
        max_inflight_bytes=100,
        max_open_shards=1,
        max_attempts=1,
    )
    config = job_config(tmp_path, {"uri": "unused"}, executor="ray")
    executor = RayExecutor(cluster, config, scheduler, make_loader=lambda: None, make_worker=lambda: None)
    for seconds in (1.0, 15.0, 5.0, 0.0):  # the reader starts; the item is handed out, loaded, and waits
        executor.poll()
        clock.now_s += seconds
    cluster.is_loaded = True
    executor.poll()
    executor.poll()
    (row,) = made
    assert row.model_wait_s == pytest.approx(20.0)
    assert row.queue_s - row.model_wait_s == pytest.approx(2.0 + TIMINGS[0].queue_s)
    assert stages_s(row) == pytest.approx(row.latency_s)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(row.finished_at)).total_seconds()) < 3600

"""Seconds of a row on the driver's clock, made with a clock of our own."""

from __future__ import annotations

import pytest

from pipeline.execution import item_timing as passage_module
from pipeline.execution.item_timing import Passage
from pipeline.execution.rows import RowMaker, RunInfo
from pipeline.records import LoadStats, MediaItem
from tests.support.runs.fakes import FakeLoader

STAGES = ("fetch_s", "load_s", "preprocess_s", "queue_s", "vision_s", "prefill_s", "decode_s")


class Clock:
    now_s = 1000.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(passage_module, "time", fake)
    return fake


@pytest.fixture
def made_row(tmp_path):
    from illava.requests import Generation, Timing, TokenUsage
    from tests.support.runs.fakes import job_config

    loaded = FakeLoader().load(MediaItem("item-1", ("1.mp4",), "video", (1,), ("",)))
    loaded = type(loaded)(loaded.item, loaded.media, loaded.frame_timestamps_s, LoadStats(1.0, 2.0, 0.5))
    generation = Generation("item-1", "1", (1,), "stop", TokenUsage(1, 1, 1, 1, 1, 1), Timing(0.25, 1.0, 2.0, 4.0, 5.0))
    rows = RowMaker(job_config(tmp_path, {"uri": "x/"}), RunInfo("r", "f"))
    return rows.answered(loaded, [generation], attempts=1, shard_index=0, latency_s=7.25)


def test_every_wait_counts_as_queue_and_the_stages_sum_to_the_latency(clock, made_row) -> None:
    passage = Passage(load_started_s=clock.now_s)
    clock.now_s += 5.5  # a load of 3.5 s behind another of 2 s
    passage.loaded(3.5, LoadStats(1.0, 2.0, 0.5))
    clock.now_s += 10.0  # loaded, waiting for a worker
    passage.handed()
    clock.now_s += 3.0 + 7.25 + 0.75  # mailbox, worker, rest of the call that brings the row
    row = passage.settle(made_row, held_s=8.0)
    assert row.latency_s == pytest.approx(5.5 + 10.0 + 3.0 + 7.25), "ends with the item, not with its call"
    assert row.queue_s == pytest.approx(0.25 + 2.0 + 10.0 + 3.0)
    assert sum(getattr(row, name) for name in STAGES) == pytest.approx(row.latency_s)


def test_time_that_no_stage_measured_shows_as_a_difference(clock, made_row) -> None:
    """The sum is a measurement, not an identity: a reader that takes 4 s longer than its stages say is seen."""
    passage = Passage(load_started_s=clock.now_s)
    clock.now_s += 7.5
    passage.loaded(7.5, LoadStats(1.0, 2.0, 0.5))
    passage.handed()
    clock.now_s += 7.25
    row = passage.settle(made_row, held_s=7.25)
    assert row.latency_s - sum(getattr(row, name) for name in STAGES) == pytest.approx(4.0)

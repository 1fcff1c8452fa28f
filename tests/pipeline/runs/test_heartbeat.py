"""Tests the heartbeat: others see by their own clock that a job is at work, and nothing depends on it.

Takes 3 s of the five minutes.
"""

from __future__ import annotations

import json
import logging
import threading
from functools import partial
from types import SimpleNamespace

import pytest

from pipeline.execution.runner import run_job
from pipeline.faults import fault_point, injected, spared
from pipeline.inspection.status import render_status, run_status
from pipeline.runs import heartbeat
from pipeline.runs.heartbeat import Beat, Heartbeat, Observer, read_beats, watch
from pipeline.runs.run import open_run
from pipeline.storage import storage
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, numbered_items, violations
from tests.support.runs.run_folders import complete, put_media


class Clock:
    """An observer's clock, which a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def beat_of(uri, session="other", **options) -> Heartbeat:
    return Heartbeat(
        uri, session, lambda: {"num_rows": 3, "num_planned": 9, "wall_s": 6.0, "num_in_work": 2}, **options
    )


def test_a_session_is_at_work_where_its_beat_changes_and_stale_where_it_does_not(root) -> None:
    clock = Clock()
    other, observer = beat_of(root, every_s=2.0), Observer(root, own="mine", clock=clock)
    beat_of(root, "mine").beat()
    observer.look()
    assert (observer.at_work, observer.unknown, observer.dead) == ([], [], []), "nobody looks at itself"
    other.beat()
    observer.look()
    assert [one.session for one in observer.unknown] == ["other"]
    clock.now_s += 29
    observer.look()
    assert (len(observer.unknown), observer.dead) == (1, [])
    other.beat()
    observer.look()
    assert [one.number for one in observer.at_work] == [2]
    clock.now_s += 29
    observer.look()
    assert observer.at_work, "lately"
    clock.now_s += 1
    observer.look()
    assert (observer.at_work, [one.session for one in observer.dead]) == ([], ["other"])
    other.close()
    observer.look()
    assert (observer.at_work, observer.unknown, observer.dead) == ([], [], [])


def test_the_writers_clock_does_not_matter(tmp_path, monkeypatch) -> None:
    other, clock = beat_of(str(tmp_path)), Clock()
    observer = Observer(str(tmp_path), clock=clock)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: -1e9, time=lambda: 0.0))
    for _ in range(2):
        other.beat()
        observer.look()
    assert observer.at_work


def test_a_beat_that_cannot_be_read_is_passed_over(tmp_path) -> None:
    storage.write_atomic(f"{tmp_path}/sessions/a.beat", b"{")
    storage.write_atomic(f"{tmp_path}/sessions/b.beat", json.dumps({"session": "b"}).encode())
    beat_of(str(tmp_path), "c").beat()
    assert [one.session for one in read_beats(str(tmp_path))] == ["c"]


def test_a_heartbeat_takes_no_part_in_injected_faults_and_its_failure_hurts_nothing(
    tmp_path, monkeypatch, caplog
) -> None:
    seen = []
    with injected(lambda name, subject: seen.append(name)):
        with spared():
            fault_point("write")
        assert seen == []
        fault_point("write")
        assert seen == ["write"]
    done = threading.Event()

    def broken(uri, data) -> None:
        done.set()
        raise OSError("disk full")

    monkeypatch.setattr(heartbeat.storage, "write_atomic", broken)
    failing = beat_of(str(tmp_path), every_s=0.01)
    with caplog.at_level(logging.INFO):
        failing.start()
        assert done.wait(60)
        failing.close()
    assert [record.levelname for record in caplog.records if "disk full" in record.message] == ["INFO"], "once"


def test_a_second_job_says_that_another_is_at_work_and_leaves_nothing_behind(tmp_path, monkeypatch, caplog) -> None:
    """The other session beats while the job's worker runs, until the job has said so."""
    monkeypatch.setattr(heartbeat, "_EVERY_S", 0.02)
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 4))
    other, limit = beat_of(str(tmp_path / "out")), iter(range(3000))
    own: list[Beat] = []

    def worker(config, run_info):
        made = fakes.barcode_worker(config, run_info)
        step = made.step

        def stepped():
            while "another job is at work" not in caplog.text and next(limit, None) is not None:
                other.beat()
                own.extend(one for one in read_beats(str(tmp_path / "out")) if one.session != "other")
                threading.Event().wait(0.02)
            return step()

        made.step = stepped
        return made

    with caplog.at_level(logging.INFO):
        summary = run_job(config, worker_factory=worker, loader_factory=fakes.fake_loader)
    assert "another job is at work on this output, session other (process" in caplog.text
    assert own
    assert own[0].progress["num_planned"] == 4
    assert summary.stats.num_rows == 4
    assert violations(tmp_path / "out") == []
    assert [one.session for one in read_beats(str(tmp_path / "out"))] == ["other"], "the job's own is gone"


def test_status_waits_for_a_second_sign_of_life(config, root) -> None:
    put_media(storage.join(root, "in"), 10)
    run = open_run(config(input={"uri": storage.join(root, "in")}, output={"uri": storage.join(root, "out")}))
    complete(run, shards=[0])
    assert "the job's own command again: illava caption --config" in render_status(run_status(run.uri))
    other = beat_of(run.uri, every_s=1000.0)
    other.beat()
    observer = Observer(run.uri)
    watch({run.uri: observer}, sleep=lambda _: other.beat())
    assert [one.session for one in observer.at_work] == ["other"]
    clock = Clock()

    def passing(seconds: float) -> None:
        clock.now_s += 1000.0

    observer = Observer(run.uri)
    watch({run.uri: observer}, sleep=passing, clock=clock)
    assert (observer.at_work, len(observer.unknown)) == ([], 1)


@pytest.fixture
def beating(monkeypatch):
    """Whoever waits for a sign of life is given one of this session."""
    sessions: list[Heartbeat] = []
    monkeypatch.setattr(heartbeat.watch, "__kwdefaults__", {"sleep": lambda _: sessions[0].beat(), "clock": Clock()})
    return sessions.append


def test_status_tells_rate_time_left_cost_and_what_to_do(config, root, beating) -> None:
    put_media(storage.join(root, "in"), 10)
    sections = {"input": {"uri": storage.join(root, "in")}, "output": {"uri": storage.join(root, "out")}}
    run = open_run(config(**sections, prices={"gpu_hour_usd": 1.0}))
    complete(run, shards=[0])
    other = beat_of(run.uri)
    other.beat()
    beating(other)
    said = render_status(run_status(run.uri))
    assert "unfinished; a job is at work on it" in said
    assert "3 of 9 items in 6 s, 2 in work, 0 failed" in said
    assert "rate     0.50 items/s, model loading included; 12 s left" in said
    assert "cost     $0.0000; 0 sessions" in said
    assert f"next     wait; then illava status {run.uri}" in said
    other.close()
    assert "unfinished; the same command resumes" in render_status(run_status(run.uri))


run_fakes = partial(run_job, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader)


def test_the_rate_of_a_run_that_has_ended_is_its_sessions(tmp_path) -> None:
    run_fakes(job_config(tmp_path / "out", numbered_items(tmp_path, 4), prices={"cpu_hour_usd": 1.0}))
    status = run_status(str(tmp_path / "out"))
    assert status.rate == pytest.approx(4 / status.spent.wall_s)
    assert status.cost_usd == status.spent.total_usd > 0
    assert "left" not in render_status(status).partition("rate")[2].splitlines()[0]

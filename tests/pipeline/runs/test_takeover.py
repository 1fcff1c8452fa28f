"""A first start that failed does not lock its output: another configuration takes the folder over. About 3 s."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from functools import partial

import pytest

from illava.errors import DeviceError, ModelLoadError, PlanError
from pipeline.errors import ClusterError, RefusedError
from pipeline.execution.runner import run_job
from pipeline.planning.dry_run import render_dry_run
from pipeline.runs.parquet_sink import ParquetSink
from pipeline.runs.run import create_or_resume, finish, open_run, plan_run
from pipeline.runs.run_record import read_run_file
from pipeline.runs.sessions import Session, may_be_alive, this_driver
from pipeline.storage import storage
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, numbered_items, read_rows, violations
from tests.support.runs.run_folders import complete, make_config, put_media, shard_rows

OTHER = {"sampling": {"max_new_tokens": 5}}


@pytest.fixture
def job(model_folder, root):
    put_media(storage.join(root, "in"), 5)
    places = {"input": {"uri": storage.join(root, "in")}, "output": {"uri": storage.join(root, "out")}}
    return partial(make_config, model_folder, **places)


def gone() -> dict:
    """The driver of a process of this machine that has ended."""
    code = "import json; from pipeline.runs.sessions import this_driver; print(json.dumps(this_driver()))"

    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


@pytest.mark.parametrize(
    "error",
    [
        PlanError("no such block"),
        DeviceError("no such device"),
        ModelLoadError("no weights"),
        ClusterError("no actors"),
        MemoryError(),
        KeyboardInterrupt(),
        RuntimeError("anything"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_ends_the_first_start_the_corrected_job_takes_over(tmp_path, caplog, error) -> None:
    out, source = tmp_path / "out", numbered_items(tmp_path, 3)

    def fails(config, run_info):
        raise error

    with pytest.raises(type(error)):
        run_job(job_config(out, source), worker_factory=fails, loader_factory=fakes.fake_loader)
    assert (out / "run.json").is_file(), "it failed after the run was created"
    first = read_run_file(str(out))
    caplog.set_level(logging.INFO)
    corrected = job_config(out, source, **OTHER)
    assert "takes over" in render_dry_run(corrected)
    assert read_run_file(str(out)) == first, "a dry run writes nothing"
    summary = run_job(corrected, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader)
    assert summary.exit_code == 0
    assert [record.message for record in caplog.records if "takes over" in record.message] == [
        f"{out}: a run of another configuration began here and published nothing; this one takes over"
    ]
    assert {row["item_id"] for row in read_rows(out)} == {"item-0", "item-1", "item-2"}
    assert violations(out) == []
    assert len(list(out.glob("manifest-*"))) == len(list((out / "sessions").iterdir())) == 1


def failed_start(config):
    """A run that a command created and left by an error."""
    run = open_run(config)
    Session(run).end(None)
    return run


def test_other_items_and_another_shard_size_take_over_as_well(job, root) -> None:
    failed_start(job())
    put_media(storage.join(root, "in"), 2, start=5)
    assert len(failed_start(job()).manifest) == 7
    assert open_run(job(output={"uri": storage.join(root, "out"), "items_per_shard": 2})).num_shards == 4
    assert [name for name in storage.list_names(storage.join(root, "out")) if name.startswith("manifest-")][1:] == []


def test_one_part_is_enough_to_keep_the_run(job) -> None:
    complete(open_run(job()), shards=[1])
    with pytest.raises(RefusedError, match=r"sampling\.max_new_tokens"):
        plan_run(job(**OTHER))


def test_a_finished_run_without_items_is_kept(job, root) -> None:
    done = open_run(job())
    complete(done)
    finish(done, {})
    night = {"input": {"uri": storage.join(root, "in"), "exclude_runs": done.uri}}
    night["output"] = {"uri": storage.join(root, "night")}
    finish(open_run(job(**night)), {})
    put_media(storage.join(root, "in"), 2, start=5)
    with pytest.raises(RefusedError, match="0 items there, 2 here"):
        plan_run(job(**night))


def test_a_driver_that_may_be_at_work_keeps_the_folder_until_it_says_that_it_ended(job) -> None:
    run = open_run(job())
    session = Session(run)
    with pytest.raises(RefusedError, match=rf"may still be at work there: .*{session.name}\.json.*delete that file"):
        plan_run(job(**OTHER))
    session.end(None)
    assert plan_run(job(**OTHER)).replaces == run.nonce


def test_a_driver_that_has_just_created_the_run_keeps_the_folder(job) -> None:
    """It has written no session yet: of two jobs that start together one is refused before it does anything."""
    open_run(job())
    with pytest.raises(RefusedError, match=r"may still be at work there: .*run\.json names"):
        plan_run(job(**OTHER))


def test_a_driver_that_was_killed_before_its_first_session_is_known_to_be_gone(job, monkeypatch) -> None:
    dead = gone()
    with monkeypatch.context() as then:
        then.setattr("pipeline.runs.run.this_driver", lambda: dead)
        run = open_run(job())
    assert plan_run(job(**OTHER)).replaces == run.nonce


def test_a_killed_driver_of_this_machine_is_known_to_be_gone(job, monkeypatch) -> None:
    run, dead = open_run(job()), gone()
    monkeypatch.setattr("pipeline.runs.sessions.this_driver", lambda: dead)
    Session(run)
    assert plan_run(job(**OTHER)).replaces == run.nonce


def test_a_driver_is_told_by_machine_number_and_start() -> None:
    here = this_driver()
    assert may_be_alive(here)
    assert may_be_alive(here | {"host": "another", "pid": gone()["pid"]})
    assert may_be_alive(None), "an earlier version named none"
    assert not may_be_alive(here | {"started": "before"}), "another process has the number by now"


def test_a_driver_that_was_alive_after_all_publishes_nothing(job) -> None:
    first = failed_start(job())
    second = open_run(job(**OTHER))
    with pytest.raises(RefusedError, match="another job took the folder over"):
        ParquetSink(first).publish(0, shard_rows(first, 0))
    complete(second)
    finish(second, {})


def test_of_two_that_take_over_one_wins_and_the_other_is_refused(job) -> None:
    failed_start(job())
    planned = [plan_run(job(sampling={"max_new_tokens": tokens})) for tokens in (5, 6)]
    winner = create_or_resume(planned[0])
    with pytest.raises(RefusedError, match="holds another run"):
        create_or_resume(planned[1])
    assert read_run_file(winner.uri)["nonce"] == winner.nonce

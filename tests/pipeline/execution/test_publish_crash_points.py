"""Tests a kill exactly before or after a publish: what is published then, and what the same command makes of it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.execution.runner import run_job
from pipeline.faults import injected
from tests.support.runs import fakes
from tests.support.runs.fakes import fixed, job_config, numbered_items, read_rows, violations

NUM_SHARDS = 5


class KilledError(BaseException):
    """Stands for the end of the process: every later fault point raises it too."""


class Kill:
    """At one fault point of one shard."""

    def __init__(self, point: str, subject: str) -> None:
        self._at, self._dead = (point, subject), False

    def __call__(self, name: str, subject: str) -> None:
        self._dead |= (name, subject) == self._at
        if self._dead:
            raise KilledError


def run(config, loaded=None):
    class Watching(fakes.FakeLoader):
        def load(self, item):
            if loaded is not None:
                loaded.append(item.item_id)
            return super().load(item)

    return run_job(config, worker_factory=fakes.barcode_worker, loader_factory=lambda *_: Watching(side=28))


@pytest.fixture(scope="module")
def whole_rows(tmp_path_factory):
    """A run without faults, free columns aside; media names do not tell the folder."""
    folder = tmp_path_factory.mktemp("whole")
    source = numbered_items(folder, 8 * NUM_SHARDS - 3)
    run(job_config(folder / "out", source))
    return source, list(map(fixed, read_rows(folder / "out")))


@pytest.mark.parametrize("shard", [0, NUM_SHARDS // 2, NUM_SHARDS - 1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("point", ["publish_before", "publish_after"])
def test_killed_at_a_publish_then_the_same_command(tmp_path, whole_rows, point, shard) -> None:
    source, expected = whole_rows
    config = job_config(tmp_path / "out", source)
    with pytest.raises(KilledError), injected(Kill(point, str(shard))):
        run(config)
    standing = sorted(int(path.stem[5:]) for path in Path(tmp_path, "out", "data").glob("part-*"))
    assert standing == list(range(shard + (point == "publish_after")))
    assert any(found.startswith("unfinished") for found in violations(tmp_path / "out"))
    loaded: list[str] = []
    assert run(config, loaded).exit_code == 0
    assert len(loaded) == len(expected) - sum(min(8, len(expected) - 8 * index) for index in standing)
    assert list(map(fixed, read_rows(tmp_path / "out"))) == expected
    assert violations(tmp_path / "out") == []


def test_a_kill_between_the_last_part_and_the_end_recomputes_nothing(tmp_path, whole_rows) -> None:
    source, expected = whole_rows
    config = job_config(tmp_path / "out", source)
    at_the_end = Kill("write", str(tmp_path / "out" / "_RUN.json"))
    passed = []

    def second_time(name: str, subject: str) -> None:  # the first write there is its removal
        if (name, subject) == ("write", str(tmp_path / "out" / "_RUN.json")):
            passed.append(subject)
        if len(passed) != 1:
            at_the_end(name, subject) if passed else None

    with pytest.raises(KilledError), injected(second_time):
        run(config)
    assert len(list(Path(tmp_path, "out", "data").glob("part-*"))) == NUM_SHARDS
    loaded: list[str] = []
    assert run(config, loaded).exit_code == 0
    assert loaded == []
    assert list(map(fixed, read_rows(tmp_path / "out"))) == expected
    assert violations(tmp_path / "out") == []


def test_a_publish_that_fails_is_not_followed_by_a_late_write(tmp_path, whole_rows) -> None:
    """The publishing thread has ended when the error reaches who called: nothing more appears in the folder."""
    source, _ = whole_rows
    config = job_config(tmp_path / "out", source, runtime={"max_open_shards": 5})

    def fail(name: str, subject: str) -> None:
        if (name, subject) == ("publish_before", "1"):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), injected(fail):
        run(config)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("publish")]

"""Plays seeded faults against whole runs, in one process on the real code, and checks the result.

A seed fixes the run's size, how many items share a medium, which media are unreadable at first, and at which fault
points each command is killed, its store or its loader fails. The same command is repeated until it ends; `retry` then
follows until no row is failed. Model and loader are the tests' fakes; manifest, shards, scheduler, sink, storage and
`verify` are the pipeline's own.

    python benchmarks/reliability/chaos.py --seeds 0:200 [--one-thread] [--root s3://bucket/prefix] [--json FILE]

The death of other processes (actors, decoder children) cannot be shown here: a kill is an exception, after which every
further fault point raises too (tests/pipeline/execution/test_runner_ray.py kills real processes). Publishing has a
thread of its own, whose pace is not the seed's: a kill in one thread meets the other wherever it stands. With
``--one-thread`` shards are published by the event loop itself, and a seed does the same on every replay.
"""

from __future__ import annotations

import argparse
import random
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks.common.machine import write_json
from pipeline.config.schema import JobConfig
from pipeline.errors import ItemError, PipelineError
from pipeline.execution import publisher
from pipeline.execution.runner import continue_run, run_job
from pipeline.faults import FAULT_POINTS, FaultPoint, injected
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.runs.retry import begin_retry
from pipeline.storage import storage
from tests.support.runs import fakes

MAX_FAULTY_COMMANDS = 5  # then the commands are left alone, and must end
MAX_CALLS = 15  # of a fault point before the kill; small, since a small run has few publishes
STORE_ERROR_RATE, LOAD_ERROR_RATE, WORKER_ERROR_RATE = 0.01, 0.1, 0.02
_STORE_ERRORS = (OSError(5, "Input/output error"), OSError(28, "No space left on device"), TimeoutError("timed out"))
_BROKEN_TYPES = ("store_error", "corrupt_media", "load_timeout", "not_found")


class KilledError(BaseException):
    """Simulates the end of the process."""


@dataclass(slots=True)
class Faults:
    """Injects the faults of one command, as a hook for `pipeline.faults`.

    Attributes:
        seed: decides, with the place and the number of calls there, so that a thread's pace does not.
        kill_at: where the process ends.
        calls_left: of that fault point, before it does.
        counts: what was done, by kind and place.
    """

    seed: float
    kill_at: str
    calls_left: int
    counts: Counter[str]
    dead: bool = False
    failed_loads: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def __call__(self, name: FaultPoint, subject: str) -> None:
        """Raise or return. After a kill every call raises: a killed process runs no further code."""
        if self.dead:
            raise KilledError
        self.calls_left -= name == self.kill_at
        if self.calls_left == 0:
            self.counts[f"kill at {name}"] += 1
            self.dead = True
            if name == "write":
                _leave_torn_write(subject)
            raise KilledError
        place = f"{name} {_kind_of_file(subject)}"
        self.calls[place] += 1
        draws = random.Random(f"{self.seed} {place} {self.calls[place]}")
        draw = draws.random()
        if name in ("read", "write") and draw < STORE_ERROR_RATE:
            self.counts[f"store error at {name}"] += 1
            raise draws.choice(_STORE_ERRORS)
        # Fewer than max_attempts for each item: only `broken` items keep failing.
        if name == "load" and draw < LOAD_ERROR_RATE and self.failed_loads[subject] < 2:
            self.failed_loads[subject] += 1
            self.counts["loader error"] += 1
            raise ItemError("store_error", "made to fail", retryable=True)
        if name == "batch" and draw < WORKER_ERROR_RATE:
            self.counts["worker error"] += 1
            raise RuntimeError("made to fail")


def _kind_of_file(subject: str) -> str:
    """Return a file's name without numbers, hashes and times; its folder's where nothing else is in the name."""
    *folders, name = subject.split("/")
    return re.split(r"[-\d]", name)[0] or (folders or [""])[-1]


@dataclass(slots=True)
class Outcome:
    """Holds the result of one seed."""

    seed: int
    num_items: int
    num_commands: int = 0
    num_broken: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


class _CallingThread(Executor):
    """Runs what is submitted at once, in the thread that submits it."""

    def __init__(self, **_: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@contextmanager
def _published_by(*, one_thread: bool) -> Iterator[None]:
    if not one_thread:
        yield
        return
    with mock.patch.object(publisher, "ThreadPoolExecutor", _CallingThread):
        yield


def play(seed: int, root: str, *, one_thread: bool = False) -> Outcome:
    """Play one seed against a new run below ``root``; the outcome has no violations where all invariants hold.

    Args:
        seed: decides the run and its faults.
        root: where the run is made.
        one_thread: the event loop publishes the shards itself, and the outcome is the seed's alone.
    """
    with _published_by(one_thread=one_thread):
        return _play(seed, root)


def _play(seed: int, root: str) -> Outcome:
    draws = random.Random(seed)
    num_items = draws.randint(1, 30)
    per_medium = random.Random(f"{seed} per medium").choice([1, 1, 2, 5])  # neighbours that ask about one medium
    outcome = Outcome(seed, num_items)
    folder = storage.join(root, f"seed-{seed}")
    lines = "\n".join(f'{{"id": "item-{n}", "uri": "{n // per_medium}.mp4"}}' for n in range(num_items))
    source = {"manifest": storage.join(folder, "items.jsonl")}
    storage.write_atomic(source["manifest"], lines.encode())
    runtime = {"max_open_shards": draws.randint(1, 4), "max_attempts": 3}
    output = {"items_per_shard": draws.choice([1, 3, 8, 64])}
    make_config = partial(fakes.job_config, source=source, runtime=runtime, output=output)
    config = make_config(storage.join(folder, "out"))
    media = {n: draws.choice(_BROKEN_TYPES) for n in range(num_items) if draws.random() < 0.1}
    broken = {f"item-{n}": media[n // per_medium] for n in range(num_items) if n // per_medium in media}
    whole = make_config(storage.join(folder, "whole"))
    outcome.num_broken = len(broken)
    try:
        _command(whole, broken={}, retry=False)
        _until_done(config, draws, outcome, broken=broken, retry=False)
        outcome.violations += _check(config.output.uri, num_items, broken)
        if broken:
            _until_done(config, draws, outcome, broken={}, retry=True)
            outcome.violations += _check(config.output.uri, num_items, {})
        outcome.violations += _differences(config.output.uri, whole.output.uri)
    except Exception as error:
        outcome.violations.append(f"never ended: {type(error).__name__}: {error}")
    return outcome


def _until_done(
    config: JobConfig, draws: random.Random, outcome: Outcome, *, broken: dict[str, str], retry: bool
) -> None:
    """Repeat a command until it ends by itself; the last ones run without faults, and their errors are raised."""
    for _ in range(MAX_FAULTY_COMMANDS):
        kill_at, calls_left = draws.choice(FAULT_POINTS), draws.randint(1, MAX_CALLS)
        faults = Faults(draws.random(), kill_at, calls_left, outcome.faults)
        outcome.num_commands += 1
        try:
            with injected(faults):
                _command(config, broken=broken, retry=retry)
            break
        except (KilledError, PipelineError, RuntimeError):
            continue
    outcome.num_commands += 1
    _command(config, broken=broken, retry=retry)  # without faults: must end, whatever was left behind


def _command(config: JobConfig, *, broken: dict[str, str], retry: bool) -> None:
    """Run one command as a user would."""
    factories: Any = {
        "worker_factory": fakes.barcode_worker,
        "loader_factory": partial(fakes.fake_loader, side=28, failing=broken),
    }
    if retry:
        continue_run(begin_retry(config.output.uri), **factories)
    else:
        run_job(config, **factories)


def _leave_torn_write(uri: str) -> None:
    """Leave the temporary file of a process that was killed before the rename, with half of the bytes."""
    if not storage.is_local(uri):
        return
    path = Path(storage.local_path(uri))
    folder = path.parent if path.suffix else path
    if folder.is_dir():
        (folder / f".{path.name}~{socket.gethostname()}~4194304~00000000.tmp").write_bytes(b"torn")


def _rows(uri: str) -> list[dict[str, Any]]:
    return [row for table in read_parts(uri, list_parts(uri)) for row in table.to_pylist()]


def _check(uri: str, num_items: int, broken: dict[str, str]) -> list[str]:
    """Check that every item has one row, that exactly the broken ones failed, and that `verify` finds nothing."""
    rows = _rows(uri)
    found = [f"verify: {violation}" for violation in fakes.violations(uri)]
    found += [f"temporary file {path}" for path in storage.temporaries(uri)]
    if Counter(row["item_id"] for row in rows) != Counter(f"item-{n}" for n in range(num_items)):
        found.append(f"{len(rows)} rows of {num_items} items, or an item twice")
    failed = {row["item_id"]: row["error_type"] for row in rows if row["status"] == "failed"}
    if failed != broken:
        found.append(f"failed rows are {failed}, made to fail were {broken}")
    return found


def _differences(uri: str, whole_uri: str) -> list[str]:
    """Return rows that differ from those of the run without faults, free columns aside."""
    pairs = zip(map(fakes.fixed, _rows(uri)), map(fakes.fixed, _rows(whole_uri)), strict=True)
    return [f"{ours['item_id']} differs from the run without faults" for ours, theirs in pairs if ours != theirs]


def main() -> int:
    """Play the seeds; return 1 where an invariant is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:200", metavar="A:B", help="A to B - 1")
    parser.add_argument("--root", metavar="URI", help="where runs are made; a temporary folder by default")
    parser.add_argument("--one-thread", action="store_true", help="publish in the event loop: a replay is exact")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="seeds played at a time")
    parser.add_argument("--json", metavar="FILE", help="where to write the sums")
    options = parser.parse_args()
    first, last = map(int, options.seeds.split(":"))
    began_s = time.perf_counter()
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(options.processes) as pool:
        play_seed = partial(play, root=options.root or temporary, one_thread=options.one_thread)
        for outcome in pool.map(play_seed, range(first, last)):
            outcomes.append(outcome)
            for violation in outcome.violations:
                seed = outcome.seed
                print(f"seed {seed}: {violation}")
                print(f"  replay: python benchmarks/reliability/chaos.py --seeds {seed}:{seed + 1}")
    faults: Counter[str] = sum((outcome.faults for outcome in outcomes), Counter())
    result = {
        "seeds": options.seeds,
        "store": "object store" if options.root and not storage.is_local(options.root) else "local folder",
        "num_violations": sum(len(outcome.violations) for outcome in outcomes),
        "failing_seeds": [outcome.seed for outcome in outcomes if outcome.violations],
        "num_items": sum(outcome.num_items for outcome in outcomes),
        "num_commands": sum(outcome.num_commands for outcome in outcomes),
        "num_failed_rows_retried": sum(outcome.num_broken for outcome in outcomes),
        "faults": dict(sorted(faults.items())),
        "fault_points_never_killed": [name for name in FAULT_POINTS if not faults[f"kill at {name}"]],
        "wall_s": round(time.perf_counter() - began_s, 1),
    }
    print("\n".join(f"{name}: {value}" for name, value in result.items()))
    if options.json:
        write_json(options.json, {"benchmark": "chaos", **result})
    return 1 if result["num_violations"] else 0


if __name__ == "__main__":
    sys.exit(main())

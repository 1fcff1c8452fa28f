"""Kills real processes of real Ray runs at seeded moments, repeats the command, and checks the result.

A seed fixes which process SIGKILL ends (decoder child, reader, VLM actor, driver) and when: after a number of loads and
answers of the whole run, plus up to 0.2 s, so that some kills fall into publishing and the end. Drivers are processes
that join one local cluster, as ``ray job submit`` starts them. `watched_job` defines the job.

    python benchmarks/reliability/ray_kill_runs.py --seeds 0:30 [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))
import psutil

from benchmarks.common.machine import write_json
from benchmarks.reliability import watched_job
from benchmarks.reliability.watched_job import ITEMS_PER_SHARD, MAX_BATCH, MAX_OPEN_SHARDS, NUM_ITEMS
from pipeline.config.schema import RuntimeConfig
from pipeline.execution.ray.actors import connect
from pipeline.execution.ray.executor import CALLS_PER_ACTOR, LOOKAHEAD_ITEMS
from tests.support.runs import fakes

# Victim -> items that may be started again because of its death.
MAX_COST = {
    "decoder": 1,
    "reader": CALLS_PER_ACTOR,
    "vlm": MAX_BATCH + LOOKAHEAD_ITEMS,
    "driver": MAX_OPEN_SHARDS * ITEMS_PER_SHARD,
}
_RUN_LIMIT_S = 240.0
_FAREWELL_S = 60.0
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Outcome:
    """Holds the result of one seed.

    Attributes:
        killed_at: loads and answers before the kill, of twice the number of items; -1 where the run ended before.
        num_again: items that were started more than once.
    """

    seed: int
    victim: str
    killed_at: int = -1
    num_lost: int = 0
    num_doubled: int = 0
    num_again: int = 0
    wall_s: float = 0.0
    violations: list[str] = field(default_factory=list)


def play(seed: int, root: Path) -> Outcome:
    """Play one seed against a new run below ``root``; the outcome has no violations where all invariants hold."""
    draws = random.Random(seed)
    victim = list(MAX_COST)[seed % len(MAX_COST)]
    outcome = Outcome(seed, victim)
    at_event, delay_s = draws.randrange(2 * NUM_ITEMS), draws.uniform(0.0, 0.2)
    folder, media = root / f"seed-{seed}", root / "media"
    watched_job.prepare(folder, media)
    began_s = time.perf_counter()
    try:
        with open(folder / "log", "ab") as log:
            driver = _start(folder, media, log)
            _kill_when(folder, driver, outcome, at_event=at_event, delay_s=delay_s)
            code = driver.wait(timeout=_RUN_LIMIT_S)
            if victim == "driver" and outcome.killed_at >= 0:
                code = _start(folder, media, log).wait(timeout=_RUN_LIMIT_S)
        if code:
            outcome.violations.append(f"the last command ended with {code}: {(folder / 'log').read_text()[-500:]}")
        _check(folder, outcome)
    except (subprocess.TimeoutExpired, TimeoutError, OSError) as error:
        outcome.violations.append(f"{type(error).__name__}: {error}")
    outcome.wall_s = round(time.perf_counter() - began_s, 1)
    return outcome


@contextmanager
def cluster() -> Iterator[None]:
    """Start a local cluster that the drivers join, large enough also for the ending actors of a killed driver."""
    paths = [str(_ROOT)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    runtime = RuntimeConfig(num_vlm_actors={"min": 1, "max": 4}, gpus_per_actor=0, num_reader_actors=4)
    with connect(runtime) as local:
        os.environ["RAY_ADDRESS"] = local.address
        try:
            yield
        finally:
            del os.environ["RAY_ADDRESS"]


def _start(folder: Path, media: Path, log: object) -> subprocess.Popen:
    command = [sys.executable, str(_ROOT / "benchmarks" / "reliability" / "watched_job.py"), str(folder), str(media)]
    return subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=log)


def _kill_when(folder: Path, driver: subprocess.Popen, outcome: Outcome, *, at_event: int, delay_s: float) -> None:
    """Kill the victim after ``at_event`` loads and answers; do nothing where the run has ended before."""
    deadline_s = time.monotonic() + _RUN_LIMIT_S
    while driver.poll() is None:
        if time.monotonic() > deadline_s:
            driver.kill()
            raise TimeoutError(f"nothing more happened after {_num_events(folder)} events")
        if _num_events(folder) >= at_event and (pid := _find(folder, driver.pid, outcome.victim)):
            time.sleep(delay_s)
            if driver.poll() is not None or not psutil.pid_exists(pid):
                continue
            outcome.killed_at = _num_events(folder)
            os.kill(pid, signal.SIGKILL)
            if outcome.victim == "driver":
                _check_all_ended(folder, outcome)
            return
        time.sleep(0.005)


def _find(folder: Path, driver_pid: int, victim: str) -> int | None:
    """Return the victim's process id, if the process runs."""
    if victim == "driver":
        return driver_pid
    kind = "vlm" if victim == "vlm" else "reader"
    pids = [int(path.name.rpartition("-")[2]) for path in (folder / "pids").glob(f"{kind}-*")]
    alive = [pid for pid in pids if psutil.pid_exists(pid)]
    if victim != "decoder" or not alive:
        return alive[0] if alive else None
    try:
        children = psutil.Process(alive[0]).children()
        return next((one.pid for one in children if "pipeline.loading.sandbox.server" in one.cmdline()), None)
    except psutil.Error:
        return None


def _check_all_ended(folder: Path, outcome: Outcome) -> None:
    """Check that a killed driver's actors and their decoder children end with it."""
    actors = [int(path.name.rpartition("-")[2]) for path in (folder / "pids").iterdir()]
    found = [psutil.Process(pid) for pid in actors if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(found, timeout=_FAREWELL_S)
    if alive:
        outcome.violations.append(f"left behind by the killed driver: {alive}")


def _check(folder: Path, outcome: Outcome) -> None:
    rows = fakes.read_rows(folder / "out")
    counts = Counter(row["item_id"] for row in rows)
    outcome.num_lost = NUM_ITEMS - len(counts)
    outcome.num_doubled = sum(counts.values()) - len(counts)
    outcome.violations += fakes.violations(folder / "out")
    outcome.violations += [
        f"{row['item_id']} has status {row['status']} and text {row['text']!r}"
        for row in rows
        if (row["status"], row["text"]) != ("ok", row["item_id"].removeprefix("item-"))
    ]
    begun = Counter((folder / "events").read_text().split())
    loads = sum(begun[f"item-{n}"] > 2 for n in range(NUM_ITEMS))  # one load and one answer each
    outcome.num_again = loads if outcome.victim == "driver" else sum(row["attempts"] > 1 for row in rows)
    if outcome.num_again > MAX_COST[outcome.victim]:
        outcome.violations.append(f"{outcome.num_again} items begun again; at most {MAX_COST[outcome.victim]} may be")


def _num_events(folder: Path) -> int:
    return (folder / "events").read_bytes().count(b"\n")


def main() -> int:
    """Play the seeds; return 1 where a row is lost or repeated, or an invariant broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:30", metavar="A:B", help="A to B - 1")
    parser.add_argument("--json", metavar="FILE", help="where to write what each came to")
    options = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as root, cluster():
        for seed in range(*map(int, options.seeds.split(":"))):
            outcomes.append(outcome := play(seed, Path(root)))
            print(f"seed {seed}: {outcome}", flush=True)
    result = summarize(outcomes)
    if options.json:
        write_json(options.json, {"benchmark": "ray_kill_runs", **result})
    return 1 if result["num_violations"] or result["num_lost"] or result["num_doubled"] else 0


def summarize(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return sums over all runs, and the result of each."""
    killed = [outcome for outcome in outcomes if outcome.killed_at >= 0]
    return {
        "num_runs": len(outcomes),
        "items_per_run": NUM_ITEMS,
        "num_killed": dict(Counter(outcome.victim for outcome in killed)),
        "num_violations": sum(len(outcome.violations) for outcome in outcomes),
        "num_lost": sum(outcome.num_lost for outcome in outcomes),
        "num_doubled": sum(outcome.num_doubled for outcome in outcomes),
        "most_begun_again": {
            kind: max((one.num_again for one in killed if one.victim == kind), default=0) for kind in MAX_COST
        },
        "allowed_to_begin_again": MAX_COST,
        "runs": [asdict(outcome) for outcome in outcomes],
    }


if __name__ == "__main__":
    sys.exit(main())

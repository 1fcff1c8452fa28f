"""Seeded faults over whole runs: see benchmarks/reliability/chaos.py, which prints and replays a failing seed."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest

from benchmarks.reliability import chaos
from pipeline.execution.runner import run_job
from pipeline.faults import FAULT_POINTS, fault_point, injected
from pipeline.storage import storage
from tests.support.runs import fakes


def play(seeds, root) -> Counter:
    outcomes = [chaos.play(seed, str(root)) for seed in seeds]
    assert {outcome.seed: outcome.violations for outcome in outcomes if outcome.violations} == {}
    return sum((outcome.faults for outcome in outcomes), Counter())


def test_twenty_seeds_leave_every_item_once_and_verify_clean(tmp_path) -> None:
    faults = play(range(20), tmp_path)
    assert sum(count for kind, count in faults.items() if kind.startswith("kill")) >= 20
    assert faults["loader error"] >= 20


@pytest.mark.long
def test_two_hundred_seeds_kill_at_every_fault_point(tmp_path) -> None:
    faults = play(range(200), tmp_path)
    assert {name for name in FAULT_POINTS if faults[f"kill at {name}"]} == set(FAULT_POINTS)


@pytest.mark.long
def test_ten_seeds_on_an_object_store(s3_bucket) -> None:
    play(range(10), f"{s3_bucket}/chaos")


def test_a_seed_is_replayed_wherever_its_folder_is(tmp_path) -> None:
    """One thread, since the pace of a second one is not the seed's; nor is the second in which a session began."""
    faults = Counter()
    for seed in range(5, 11):
        once, again = (chaos.play(seed, str(tmp_path / name), one_thread=True) for name in ("once", "again"))
        assert once == again
        faults += once.faults
    assert len(faults) >= 4, "kinds of faults that were drawn twice alike"


def test_a_defect_is_found_such_as_a_sweep_that_sweeps_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "sweep_temporaries", lambda uri: [])
    found = [violation for seed in range(8) for violation in chaos.play(seed, str(tmp_path / "unswept")).violations]
    assert any(violation.startswith("temporary file") for violation in found)


def test_every_fault_point_is_passed_by_a_run_and_costs_nothing_more_when_off(tmp_path) -> None:
    passed = Counter()
    config = fakes.job_config(tmp_path / "out", fakes.numbered_items(tmp_path, 10))
    with injected(lambda name, subject: passed.update([name])):
        run_job(config, worker_factory=fakes.barcode_worker, loader_factory=partial(fakes.fake_loader))
    assert passed.keys() == set(FAULT_POINTS)
    assert (passed["lease"], passed["load"], passed["publish_before"], passed["publish_after"]) == (10, 10, 2, 2)
    before = passed.copy()
    fault_point("read")
    assert passed == before, "the hook is gone with its block"


def test_a_second_hook_is_refused() -> None:
    with injected(lambda name, subject: None), pytest.raises(RuntimeError, match="hook already"), injected(print):
        pass

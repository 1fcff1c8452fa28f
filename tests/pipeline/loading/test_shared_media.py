"""Tests many questions on one medium in whole runs: one load, one encoding, correct sums, and the same rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from pipeline.execution.item_timing import ItemTimeline, loaded_together
from pipeline.execution.runner import run_job
from pipeline.execution.worker import VLMWorker
from pipeline.faults import injected
from pipeline.records import LoadStats
from tests.support.runs import fakes
from tests.support.runs.fakes import fixed, job_config, numbered_items, read_rows, violations

CLIPS = Path(__file__).resolve().parents[3] / "configs" / "demo" / "clips"
PRICES = {"cpu_hour_usd": 3600.0, "storage_request_usd": 1.0}


class CountingLoader(fakes.FakeLoader):
    """Counts loads by medium, and says that each took bytes, a request and CPU time."""

    loads: Counter = Counter()

    def load(self, item):
        self.loads[item.uris[0].rpartition("/")[2]] += 1
        loaded = super().load(item)
        spent = replace(loaded.stats, bytes_fetched=100, storage_requests=1, cpu_s=0.25)
        return replace(loaded, stats=spent)


def counting_loader(config, preprocessor, **options):
    return CountingLoader(**options)


@pytest.fixture
def loads():
    CountingLoader.loads = Counter()
    return CountingLoader.loads


def run(out, source, *, loader=None, **options):
    config = job_config(out, source, prices=PRICES, **options)
    return run_job(
        config, worker_factory=fakes.barcode_worker, loader_factory=partial(counting_loader, **(loader or {}))
    )


def test_each_medium_is_loaded_once_and_its_cost_is_counted_once(tmp_path, loads) -> None:
    run(tmp_path / "out", numbered_items(tmp_path, 12, per_medium=3))
    assert loads == {f"{n}.mp4": 1 for n in range(3)} | {"2.mp4": 2, "3.mp4": 1}, "2.mp4 is asked about in both shards"
    rows = read_rows(tmp_path / "out")
    assert [row["text"] for row in rows] == [str(n // 3) for n in range(12)]
    assert [row["bytes_fetched"] for row in rows] == [100, 0, 0, 100, 0, 0, 100, 0, 100, 100, 0, 0]
    assert sum(row["cpu_s"] for row in rows) == pytest.approx(5 * 0.25)
    assert sum(row["cost_usd"] for row in rows) == pytest.approx(5 * (0.25 + 1.0) + sum(row["gpu_s"] for row in rows))
    assert violations(tmp_path / "out") == []


def test_the_rows_are_those_of_a_run_that_loads_each_item(tmp_path, loads) -> None:
    source = numbered_items(tmp_path, 12, per_medium=3)
    run(tmp_path / "together", source)
    run(tmp_path / "alone", source, model={"max_batch_requests": 1})
    assert sum(loads.values()) == 5 + 12
    assert list(map(fixed, read_rows(tmp_path / "together"))) == list(map(fixed, read_rows(tmp_path / "alone")))


def test_a_medium_that_cannot_be_read_is_a_failed_row_of_each_question(tmp_path, loads) -> None:
    source = numbered_items(tmp_path, 6, per_medium=3)
    summary = run(tmp_path / "out", source, loader={"failing": {"item-3": "corrupt_media"}})
    rows = read_rows(tmp_path / "out")
    assert [row["error_type"] for row in rows] == [None] * 3 + ["corrupt_media"] * 3
    assert summary.exit_code == 3
    assert violations(tmp_path / "out") == []


def test_an_item_that_shares_a_load_waits_for_it() -> None:
    first, second = ItemTimeline(), ItemTimeline()
    loaded_together([first, second], 1.5, LoadStats(0.5, 0.75, 0.25, cpu_s=1.0, bytes_fetched=7, decoder="pyav"))
    assert first.stats == LoadStats(0.5, 0.75, 0.25, cpu_s=1.0, bytes_fetched=7, decoder="pyav")
    assert second.stats == LoadStats(decoder="pyav")


class KilledError(BaseException):
    """The simulated end of the process."""


@pytest.mark.parametrize("point", ["load", "batch", "publish_after"])
def test_a_crash_among_shared_media_costs_no_row(tmp_path, loads, point) -> None:
    source = numbered_items(tmp_path, 24, per_medium=4)
    run(tmp_path / "whole", source)
    left = [2]

    def kill(name, subject):
        left[0] -= name == point
        if left[0] <= 0:
            raise KilledError

    with pytest.raises(KilledError), injected(kill):
        run(tmp_path / "out", source)
    assert len(read_rows(tmp_path / "out")) < 24
    run(tmp_path / "out", source)
    assert list(map(fixed, read_rows(tmp_path / "out"))) == list(map(fixed, read_rows(tmp_path / "whole")))
    assert violations(tmp_path / "out") == []


def watched_worker(config, run_info, *, calls):
    """The bundled model, the media of each tower call counted."""
    worker = VLMWorker(config, run_info)
    family = worker._batch._vlm.family
    encode = family.encode
    family.encode = lambda media, *a, **k: calls.append(len(media)) or encode(media, *a, **k)
    return worker


def test_each_medium_is_encoded_once_by_the_bundled_model(tmp_path) -> None:
    clips = sorted(CLIPS.glob("*.mp4"))[:2]
    asked = ("What colour is the shape?", "Which way does it move?", "How many shapes are there?")
    lines = [{"uri": clip.name, "question": text} for clip in clips for text in asked]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"uri": f"{CLIPS}/", "manifest": str(tmp_path / "asked.jsonl")}
    rows = {}
    for name, batch in (("together", 8), ("alone", 1)):
        calls: list[int] = []
        config = job_config(
            tmp_path / name,
            source,
            task={"kind": "question"},
            sampling={"max_new_tokens": 4},
            model={"max_batch_requests": batch, "kv_cache_bytes": 50_000_000},
        )
        run_job(config, worker_factory=partial(watched_worker, calls=calls))
        rows[name] = list(map(fixed, read_rows(tmp_path / name)))
        assert sum(calls) == (2 if name == "together" else 6)
        assert violations(tmp_path / name) == []
    assert rows["together"] == rows["alone"]

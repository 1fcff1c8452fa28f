"""Tests the nightly drift line: which nights it compares with, and what it calls drifting.

Takes 2 s of the five minutes.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipeline.evaluation.drift import drift_line, figures
from pipeline.inspection.verify import verify_run
from pipeline.runs.parquet_sink import ParquetSink
from pipeline.runs.run import finish, open_run
from pipeline.runs.totals import Totals, recorded_totals
from pipeline.storage import storage
from tests.support.runs.run_folders import failed_row, make_row

STEADY = Totals(
    1000,
    {"ok": 980, "failed": 20},
    {"corrupt_media": 20},
    {"loop": 5, "stop": 975},
    {"num_generated_tokens": 39200.0},
    2,
)
NIGHTS = [STEADY] * 7


@pytest.mark.parametrize(
    ("changes", "drifting"),
    [
        ({}, []),
        ({"by_finish_reason": {"loop": 9, "stop": 971}}, []),
        ({"by_finish_reason": {"loop": 60, "stop": 920}}, ["loops"]),
        ({"num_empty": 40}, ["empty"]),
        ({"sums": {"num_generated_tokens": 20000.0}}, ["answer length"]),
        ({"sums": {"num_generated_tokens": 43000.0}}, []),
        ({"by_status": {"ok": 800, "failed": 200}, "sums": {"num_generated_tokens": 32000.0}}, ["failed"]),
        (
            {"num_rows": 10, "by_status": {"ok": 9, "failed": 1}, "by_finish_reason": {}, "num_empty": 0}
            | {"sums": {"num_generated_tokens": 360.0}},
            [],
        ),
    ],
    ids=str,
)
def test_what_drifts(changes, drifting):
    found = figures(replace(STEADY, **changes), NIGHTS)
    assert [one.name for one in found] == ["loops", "empty", "failed", "answer length"]
    assert [one.name for one in found if one.drifts] == drifting


def test_nights_that_did_not_count_empty_answers_are_not_compared_by_them():
    found = figures(STEADY, [replace(STEADY, num_empty=None)])
    assert [one.name for one in found] == ["loops", "failed", "answer length"]
    spotless = replace(STEADY, by_finish_reason={"stop": 1000}, by_status={"ok": 1000}, num_empty=0)
    assert "loops 6.1% (0.0%) DRIFTS" in map(str, figures(replace(STEADY, by_finish_reason={"loop": 60}), [spotless]))
    assert [one.name for one in figures(Totals(3, {"failed": 3}), NIGHTS)] == ["failed"]


@pytest.fixture
def night(config, tmp_path):
    """Makes one night's run of two items, created on that day, with texts (None for a failed row)."""
    dataset = storage.join(str(tmp_path), "captions")
    created = []

    def make(day, *texts):
        for n in range(len(texts)):
            storage.write_atomic(storage.join(str(tmp_path), "in", f"{day}-{n}.mp4"), b"x")
        output = {"uri": storage.join(dataset, f"night-{day}"), "items_per_shard": 100}
        run = open_run(config(input={"uri": storage.join(str(tmp_path), "in"), "exclude_runs": dataset}, output=output))
        uri = storage.join(run.uri, "run.json")
        record = json.loads(storage.read(uri)) | {"created_at": f"2026-11-{day:02d}T00:00:00+00:00"}
        storage.write_atomic(uri, json.dumps(record).encode())
        rows = [
            failed_row(run, 0, item) if text is None else make_row(run, 0, item, text=text)
            for item, text in zip(run.manifest.items, texts, strict=True)
        ]
        ParquetSink(run).publish(0, rows)
        finish(run, {})
        created.append(run.uri)
        return run.uri

    make.dataset = dataset
    return make


def test_the_line_compares_with_the_nights_before_and_counts_empty_answers(night):
    first = night(1, "a cat", "a dog")
    assert drift_line(first, night.dataset) is None, "nothing to compare with"
    second = night(2, " \n", None)
    assert drift_line(second, night.dataset) == (
        "loops 0.0% (0.0%), empty 100.0% (0.0%), failed 50.0% (0.0%), answer length 20 tokens (20 tokens); "
        "in brackets: 1 run before"
    )
    assert drift_line(first, night.dataset) is None, "a later night is none before"
    assert recorded_totals(second).num_empty == 1
    assert verify_run(second) == []
    assert drift_line(second, None) is None


def test_only_the_last_seven_nights_count(night):
    for day in range(1, 10):
        last = night(day, "" if day < 2 else "a cat")
    line = drift_line(last, night.dataset)
    assert line.endswith("in brackets: 7 runs before")
    assert "empty 0.0% (0.0%)" in line

"""One form for what a reduction keeps: on every screen the same counts, the same words and the same share."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa
import pytest

from illava.token_counts import TokenCounts
from pipeline.execution.reporting.progress import Progress
from pipeline.execution.reporting.summary import RunStats, RunSummary, render_summary
from pipeline.inspection.status import render_status, run_status
from pipeline.report.figures import run_figures
from pipeline.report.page import render_report
from pipeline.retention import Retention, retention_ratio
from pipeline.runs import totals
from pipeline.runs.parquet_sink import read_parts
from pipeline.runs.run import open_run
from tests.support.runs.run_folders import complete, make_config, put_media, shard_rows

OF_DEMO = TokenCounts(1568, 800, 393, 393, 118)


def test_the_form_has_the_tower_the_llm_and_one_share() -> None:
    retention = Retention.of(OF_DEMO)
    assert retention.ratio == pytest.approx(118 / 393)
    assert retention.brief == "patches 1,568 -> 800, tokens 393 -> 118, kept 30.0%"
    assert retention.lines == [
        ("patches", "1,568 -> 800 out of the tower"),
        ("tokens", "393 into the LLM -> 118 in its last layer"),
        ("kept", "30.0% of the 393 tokens the unreduced model has there"),
    ]
    assert Retention.of(OF_DEMO.times(8), num_items=8) == retention


def test_upper_bounds_old_rows_and_items_without_media_say_so() -> None:
    bound = Retention.of(TokenCounts(100, 50, 40, 30, 20, exact=False))
    assert bound.brief == "patches 100 -> at most 50, tokens at most 30 -> at most 20, kept at most 50.0%"
    old = Retention.of({name: 10 for name in asdict(OF_DEMO) if name not in {"num_patches_kept", "exact"}})
    assert (old.num_patches_kept, old.lines[0]) == (None, ("patches", "10 into the tower"))
    nothing = Retention.of(RunStats())
    assert (nothing.ratio, nothing.lines, retention_ratio(0, 0)) == (None, [], None)


@pytest.fixture
def published(root, model_folder):
    """A run of 23 items in six shards; items 9 and 19 failed."""
    put_media(f"{root}/in", 23)
    run = open_run(make_config(model_folder, input={"uri": f"{root}/in"}, output={"uri": f"{root}/out"}))
    complete(run)
    return run


def test_every_screen_has_the_same_form(published) -> None:
    stats = RunStats()
    progress = Progress(23, stats, terminal=False)
    for index in range(published.num_shards):
        for row in shard_rows(published, index):
            progress.add(row)
    lines = [
        f"{21 * 5832:,} -> {21 * 2888:,} out of the tower",
        f"{21 * 800:,} into the LLM -> {21 * 560:,} in its last layer",
        f"35.7% of the {21 * 1568:,} tokens the unreduced model has there",
    ]
    summary = RunSummary(0, "job", published.uri, 23, 0, stats, 1.0, None)
    report = render_report(run_figures(published.uri, num_samples=1), [()])
    for screen in (render_summary(summary), render_status(run_status(published.uri)), report.replace("&gt;", ">")):
        assert [line for line in lines if line not in screen] == [], screen
    assert "patches 122,472 -> 60,648, tokens 16,800 -> 11,760, kept 35.7%" in progress.line(1.0)
    assert "patches 5,832 -> 2,888, tokens 800 -> 560, kept 35.7%" in report.replace("&gt;", ">")


def test_of_a_run_some_of_whose_parts_do_not_say_it_no_sum_is_given(published, monkeypatch) -> None:
    """An unfinished run of an earlier version, gone on with: half a sum would be a wrong one."""

    def read(uri, indexes, names):
        for number, table in enumerate(read_parts(uri, indexes, names)):
            place = table.column_names.index("num_patches_kept")
            unknown = pa.nulls(table.num_rows, pa.int64())
            yield table.set_column(place, "num_patches_kept", unknown) if number == 0 else table

    monkeypatch.setattr(totals, "read_parts", read)
    status = run_status(published.uri)
    assert "num_patches_kept" not in status.totals.sums
    assert f"  patches  {21 * 5832:,} into the tower\n" in render_status(status)
    page = render_report(run_figures(published.uri, num_samples=0), [])
    assert "out of the tower" not in page

"""Failed items are named, `next` is what helps, too many end the run, and the same failure is not bought every night.

About 4 s.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest

from pipeline.config.runtime import RuntimeConfig
from pipeline.execution.reporting.failures import FailureExamples, command_for, failed_too_often
from pipeline.execution.reporting.summary import render_line, render_summary
from pipeline.execution.runner import continue_run, run_job
from pipeline.inputs.permanent_failures import PERMANENT, PERMANENT_UNDER, permanent_types
from pipeline.records import ROW_ERROR_TYPES
from pipeline.runs.retry import begin_retry
from tests.support.runs import fakes
from tests.support.runs.fakes import job_config, numbered_items, read_rows, violations


def run(config, failing=None, **loader):
    make_loader = partial(fakes.fake_loader, failing=failing or {}, **loader)
    return run_job(config, worker_factory=fakes.barcode_worker, loader_factory=make_loader)


def failing(numbers, error_type="corrupt_media") -> dict[str, str]:
    return {f"item-{n}": error_type for n in numbers}


def next_of(summary) -> str:
    return render_summary(summary).rpartition("next ")[2].strip()


def test_up_to_five_failed_items_are_named_with_type_and_message_and_every_type_is_among_them(tmp_path) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 20))
    summary = run(config, failing(range(7)) | failing([12], "not_found") | failing([15], "load_timeout"))
    lines = render_summary(summary).splitlines()
    at = next(n for n, line in enumerate(lines) if "failures" in line)
    assert lines[at].split(maxsplit=1)[1] == "7 corrupt_media, 1 not_found, 1 load_timeout"
    named = [line.strip() for line in lines[at + 1 : at + 7]]
    assert [line.split(": ")[1] for line in named[:5]] == ["corrupt_media"] * 3 + ["not_found", "load_timeout"]
    assert named[0] == f"{tmp_path}/0.mp4: corrupt_media: made to fail"
    assert named[5] == "and 4 more"


def test_next_is_the_command_that_helps(tmp_path) -> None:
    source = numbered_items(tmp_path, 4)
    out = {name: tmp_path / name for name in ("ok", "slow", "broken")}
    assert next_of(run(job_config(out["ok"], source))) == f"illava verify {out['ok']}"
    slow = run(job_config(out["slow"], source), failing([1], "load_timeout"))
    assert next_of(slow) == f"illava retry {out['slow']} --only load_timeout --set media.load_timeout_s=600"
    broken = run(job_config(out["broken"], source), failing([1]))
    assert next_of(broken).startswith("mend or leave out these files")
    again = run(job_config(out["slow"], source))
    assert (again.stats.num_rows, again.exit_code) == (0, 3)
    assert "--only load_timeout" in next_of(again), "also when this command had nothing to do"


def test_all_failed_looks_different(tmp_path) -> None:
    some = run(job_config(tmp_path / "some", numbered_items(tmp_path, 3)), failing(range(2)))
    none = run(job_config(tmp_path / "none", numbered_items(tmp_path, 3)), failing(range(3), "access_denied"))
    assert "FAILED" not in render_summary(some) + render_line(some)
    assert render_summary(none).startswith("test: ALL 3 items FAILED")
    assert "ALL 3 items FAILED" in render_line(none)


@pytest.mark.parametrize(("max_failed", "stops"), [(3, True), (4, False), (0.09, True), (0.25, False), (None, False)])
def test_more_failed_items_than_allowed_stop_the_command_with_a_code_of_its_own(tmp_path, max_failed, stops) -> None:
    config = job_config(tmp_path / "out", numbered_items(tmp_path, 40), runtime={"max_failed": max_failed})
    summary = run(config, failing(range(4), "store_error"))
    assert summary.exit_code == (7 if stops else 3)
    if not stops:
        assert summary.num_left == 0
        return
    assert 4 <= summary.stats.num_rows < 40
    said = render_summary(summary)
    assert "items FAILED, more than runtime.max_failed allows; stopped" in said
    assert "the same command resumes" in next_of(summary)
    mended = run(config)
    assert mended.exit_code in (0, 3)
    assert {row["item_id"] for row in read_rows(tmp_path / "out")} == {f"item-{n}" for n in range(40)}
    assert violations(tmp_path / "out") == []


def test_a_finished_run_over_the_limit_keeps_its_exit_code_until_a_retry_mends_it(tmp_path) -> None:
    source = numbered_items(tmp_path, 8)
    assert run(job_config(tmp_path / "out", source), failing([6, 7], "store_error")).exit_code == 3
    config = job_config(tmp_path / "out", source, runtime={"max_failed": 1})
    again = run(config)
    assert (again.exit_code, again.num_left) == (7, 0)
    assert "--only store_error" in next_of(again)
    options = {"worker_factory": fakes.barcode_worker, "loader_factory": fakes.fake_loader}
    assert continue_run(begin_retry(str(tmp_path / "out")), **options).exit_code == 0
    assert run(config).exit_code == 0


@pytest.mark.parametrize("value", [-1, 1.5, 0.0001, 0, 7, "x", True, float("nan")])
def test_max_failed_is_a_count_or_a_share(value) -> None:
    if value in (0.0001, 0, 7) and value is not True:
        found = RuntimeConfig(max_failed=value).max_failed
        assert (found, type(found)) == (value, type(value))
        return
    with pytest.raises(ValueError, match=r"a count such as 100, a share above 0 and below 1"):
        RuntimeConfig(max_failed=value)


def test_the_limit_is_passed_by_more_not_by_as_many() -> None:
    assert not failed_too_often(None, 10**6, 10**6)
    assert [failed_too_often(2, failed, 100) for failed in (1, 2, 3)] == [False, False, True]
    assert [failed_too_often(0.02, failed, 100) for failed in (1, 2, 3)] == [False, False, True]


def test_what_fails_by_its_file_is_not_tried_every_night_but_retry_can(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    source = numbered_items(tmp_path, 6) | {"exclude_runs": str(tmp_path / "nights")}
    nights = [tmp_path / "nights" / str(n) for n in range(4)]
    first = run(job_config(nights[0], source), failing([1, 2]) | failing([3], "store_error"))
    assert first.exit_code == 3
    second = run(job_config(nights[1], source), failing([3], "store_error"))
    assert {row["item_id"] for row in read_rows(nights[1])} == {"item-3"}, "what may pass is tried again"
    assert (second.num_items, second.num_skipped) == (1, 5)
    assert "2 items failed in earlier runs by what their files are" in caplog.text
    options = {"worker_factory": fakes.barcode_worker, "loader_factory": fakes.fake_loader}
    retried = continue_run(begin_retry(str(nights[0]), only=["corrupt_media"]), **options)
    assert retried.stats.statuses == {"ok": 2}
    assert run(job_config(nights[2], source)).num_items == 1, "item-3 alone: night 2 failed to load it, too"


def test_a_file_that_was_mended_is_tried_again(tmp_path) -> None:
    manifest = Path(tmp_path, "items.jsonl")

    def night(number, etag):
        media = [("a", "0.mp4", etag), ("b", "1.mp4", "b")]
        lines = [{"id": name, "uri": uri, "etag": tag, "size": 9} for name, uri, tag in media]
        manifest.write_text("\n".join(map(json.dumps, lines)))
        source = {"manifest": str(manifest), "exclude_runs": str(tmp_path / "nights")}
        return run(job_config(tmp_path / "nights" / str(number), source), {"a": "corrupt_media"})

    assert night(1, "broken").num_items == 2
    assert night(2, "broken").num_items == 0
    assert night(3, "mended").num_items == 1


def test_a_limit_that_was_raised_makes_its_failures_worth_another_try(tmp_path) -> None:
    before = job_config(tmp_path, {"uri": "in"}, runtime={"cache_bytes": 1000})
    recorded = before.model_dump(mode="json")
    assert permanent_types(recorded, before) == PERMANENT | PERMANENT_UNDER.keys()
    more = job_config(tmp_path, {"uri": "in"}, runtime={"cache_bytes": 2000})
    assert permanent_types(recorded, more) == PERMANENT | {"prompt_too_long", "cache_too_small"}
    more = job_config(tmp_path, {"uri": "in"}, runtime={"cache_bytes": 1000}, model={"kv_cache_bytes": 1 << 30})
    assert permanent_types(recorded, more) == PERMANENT | {"too_large"}


@pytest.mark.parametrize("error_type", ROW_ERROR_TYPES)
def test_every_error_type_has_a_next_command(error_type) -> None:
    from pipeline.__main__ import build_parser

    said = command_for({error_type: 3}, "runs/x")
    assert "illava " in said
    if "illava retry" in said:
        options = build_parser().parse_args(said[said.index("illava retry") :].split()[1:])
        assert options.only == error_type
    else:
        assert "illava report runs/x" in said


def test_the_most_frequent_failure_that_can_be_helped_decides() -> None:
    assert command_for({"corrupt_media": 9, "store_error": 2, "not_found": 1}, "r") == (
        "illava retry r --only store_error,not_found"
    )
    assert command_for({"store_error": 2, "load_timeout": 1}, "r") == "illava retry r --only store_error"


def test_an_item_of_several_objects_is_named_by_its_id(tmp_path) -> None:
    run(job_config(tmp_path / "out", numbered_items(tmp_path, 1)), failing([0]))
    [row] = read_rows(tmp_path / "out")
    examples = FailureExamples()
    row = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    from pipeline.records import ResultRow

    names = {one.name for one in dataclasses.fields(ResultRow)}
    made = ResultRow(**{name: value for name, value in row.items() if name in names} | {"fields": {}})
    examples.add(dataclasses.replace(made, uris=("a.png", "b.png")))
    assert examples.items[0].name == "item-0"

"""Tests runs of an earlier version: they resume, verify, retry, report and compare, now and in the next version.

What later versions may change, and how: `pipeline.runs.run_record` (configuration), `pipeline.runs.row_schema`
(columns). Takes half a minute of the ten.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import duckdb
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import JobConfig, result_fields
from pipeline.errors import RefusedError
from pipeline.evaluation.compare import compare_runs
from pipeline.evaluation.run_scores import score_run
from pipeline.execution.runner import continue_run, run_job
from pipeline.inputs import manifest
from pipeline.inputs.permanent_failures import PERMANENT
from pipeline.inspection.status import run_status
from pipeline.planning.probe import probe
from pipeline.records import FIRST_SCHEMA_VERSION, LATER_COLUMNS, SCHEMA_VERSION
from pipeline.report.write import write_report
from pipeline.runs import config_fingerprint, run_record, sessions
from pipeline.runs.parquet_sink import list_parts, read_parts, result_rows
from pipeline.runs.retry import begin_retry
from pipeline.runs.row_schema import SCHEMA, schema_of
from pipeline.runs.run import open_run, plan_run
from pipeline.runs.run_record import config_diff, read_run_file, recorded_config, recorded_config_fingerprint
from tests.support.runs.fakes import read_rows, violations

HERE = Path(__file__).resolve().parent
NEXT_VERSION = HERE.parents[1] / "support" / "runs" / "next_version.py"
DATA = HERE / "data" / "runs_27c8a0a"
NEXT_VERSION = HERE.parents[1] / "support" / "runs" / "next_version.py"
RUNS = ["documents", "finished", "interrupted", "questions", "questions_merged", "retried", "retrying"]
BUCKET = "illava-27c8a0a"
VERSIONS = {
    key.removeprefix("versions."): version
    for key, version in json.loads((DATA / "finished" / "run.json").read_text())["recipe"].items()
    if key.startswith("versions.")
}


@pytest.fixture
def folder(tmp_path, s3_environment, monkeypatch) -> Path:
    """A copy of the runs, as the working folder, on a machine with the libraries they were made with."""
    shutil.copytree(DATA, tmp_path / "runs")
    client = boto3.client("s3", endpoint_url=s3_environment["AWS_ENDPOINT_URL"])
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        region = s3_environment["AWS_DEFAULT_REGION"]
        client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": region})
        for path in (DATA / "media").rglob("*.*"):
            client.put_object(Bucket=BUCKET, Key=path.relative_to(DATA / "media").as_posix(), Body=path.read_bytes())
    monkeypatch.chdir(tmp_path / "runs")
    monkeypatch.setattr(config_fingerprint, "_version", VERSIONS.get)
    return tmp_path / "runs"


def job(name: str, section: str = "output", **changes) -> JobConfig:
    """The job that made a run, some keys of a section changed."""
    config = recorded_config(read_run_file(name), source=name)
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def parts(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(name, "data").iterdir())}


def statuses(name: str) -> list[str]:
    return [row["error_type"] or row["status"] for row in read_rows(name)]


def test_a_finished_run_is_read_as_ever_and_has_nothing_left_to_do(folder) -> None:
    before = parts("finished")
    summary = run_job(job("finished"))
    assert (summary.exit_code, summary.num_done_before, summary.stats.num_rows) == (3, 6, 0)
    assert parts("finished") == before
    assert violations("finished") == []
    status = run_status("finished")
    assert (status.finished, status.num_shards_done) == (True, 2)
    assert status.totals.by_status == {"failed": 2, "ok": 3, "partial": 1}
    assert status.totals.sums["cost_usd"] > 0
    page = Path(write_report("finished")).read_text()
    assert "unsupported_media" in page
    assert "store_error" in page


def test_an_interrupted_run_resumes_behind_its_published_part(folder) -> None:
    before = parts("interrupted")
    summary = run_job(job("interrupted"))
    assert (summary.num_done_before, summary.stats.num_rows) == (3, 3)
    after = parts("interrupted")
    assert after.keys() - before.keys() == {"part-00001.parquet"}
    assert after.items() >= before.items()
    assert violations("interrupted") == []
    assert statuses("interrupted") == ["ok", "unsupported_media", "ok", "ok", "partial", "ok"]
    record = read_run_file("interrupted")
    for name in ("fingerprint", "recipe_digest"):
        column = "run_fingerprint" if name == "fingerprint" else name
        assert {row[column] for row in read_rows("interrupted")} == {record[name]}


@pytest.mark.parametrize(
    ("name", "num_retried", "healed"),
    [
        ("finished", 2, ["ok", "unsupported_media", "ok", "ok", "partial", "ok"]),
        ("retrying", 2, ["ok", "unsupported_media", "ok"]),
        ("retried", 1, ["ok", "unsupported_media", "ok"]),
    ],
)
def test_failed_rows_are_retried_and_the_others_kept(folder, name, num_retried, healed) -> None:
    later = dict.fromkeys(column for column in LATER_COLUMNS if "." not in column)  # null in what is kept
    kept = [later | row for row in read_rows(name) if row["status"] != "failed"]
    attempt = 2 if name == "retrying" else read_run_file(name)["attempt"] + 1
    summary = continue_run(begin_retry(name))
    assert summary.stats.num_rows == num_retried
    assert statuses(name) == healed
    assert [row for row in read_rows(name) if row["item_id"] in {one["item_id"] for one in kept}] == kept
    assert read_run_file(name)["attempt"] == attempt
    assert violations(name) == []


@pytest.mark.parametrize("name", ["interrupted", "retrying"])
def test_what_is_left_of_a_run_is_probed_beside_it(folder, name) -> None:
    before = {path: path.read_bytes() for path in Path(name).rglob("*.*")}
    found = probe(job(name), 4)
    assert (found.num_items, found.num_probed) == (3, 3)
    assert {path: path.read_bytes() for path in Path(name).rglob("*.*")} == before


def test_pages_and_questions_are_read_reported_compared_and_scored(folder) -> None:
    for name in ("documents", "questions", "questions_merged"):
        assert violations(name) == []
        assert open_run(job(name)).resumed
    assert begin_retry("documents").attempt == 1, "a page that cannot be shown is not retried"
    assert "too_large" in [page["error_type"] for page in read_rows("documents")[0]["pages"]]
    write_report("documents")
    comparison = compare_runs("questions", "questions_merged")
    assert (comparison.num_pairs, list(comparison.differing_config)) == (2, ["reduction"])
    assert score_run("questions").num_rows == 2


def test_todays_run_of_the_same_job_is_told_nothing_else(folder) -> None:
    run_job(job("questions", uri="today"))
    assert compare_runs("questions", "today").differing_config == {}
    assert "schema_version" not in read_run_file("today")["recipe"]


@pytest.mark.parametrize("earlier", ["finished", "interrupted", "retried"])
def test_an_incremental_run_leaves_out_what_old_runs_did(folder, earlier) -> None:
    rows = read_rows(earlier)
    done = [row["item_id"] for row in rows if row["status"] != "failed" or row["error_type"] in PERMANENT]
    config = job("finished", uri="incremental")
    config = config.model_copy(update={"input": config.input.model_copy(update={"exclude_runs": earlier})})
    items = plan_run(config).manifest
    assert items.num_done == len(done)
    assert not {item.item_id for item in items.items} & set(done)
    other = config.model_copy(update={"seed": 1})
    assert plan_run(other).manifest.num_done == 0


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_means_what_the_same_job_means_today(folder, name) -> None:
    config = job(name)
    assert (
        config_diff(
            recorded_config_fingerprint(read_run_file(name)),
            config_fingerprint.resolve_config_fingerprint(config).fields,
        )
        == {}
    )
    run = plan_run(config)
    assert run.resumed
    assert run.fingerprint == json.loads((DATA / name / "run.json").read_text())["fingerprint"]


def test_what_changes_a_row_is_refused_of_an_old_run_and_nothing_else_is_named(folder) -> None:
    with pytest.raises(RefusedError) as caught:
        open_run(job("finished", "media", num_frames=5))
    assert [line for line in str(caught.value).splitlines() if line.startswith("  ")] == [
        "  media.num_frames: 4 there, 5 here"
    ]
    with pytest.raises(RefusedError, match=r"sampling.top_p: 1.0 there, 0.5 here"):
        begin_retry("finished", overrides=["sampling.top_p=0.5"])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_from_before_loops_were_looked_for_goes_on_without(folder, name) -> None:
    """`loop_tokens` is 256 by default. Where answers are shorter that is no other run; else the key is named."""
    config = job(name)
    assert config.sampling.loop_tokens is None
    before = {key for key in read_run_file(name)["recipe"] if key.startswith("sampling.")}
    assert {key for key in result_fields(config) if key.startswith("sampling.")} == before, "what is off is left out"
    assert plan_run(job(name, "sampling", loop_tokens=256, on_loop="cut")).resumed, "an answer has 4 tokens"
    with pytest.raises(RefusedError) as caught:
        plan_run(job(name, "sampling", loop_tokens=4))
    assert [line for line in str(caught.value).splitlines() if line.startswith("  ")] == [
        "  sampling.loop_tokens: null there, 4 here"
    ]


def test_a_record_that_was_edited_is_refused(folder) -> None:
    record = read_run_file("finished")
    Path("finished", "run.json").write_text(json.dumps(record | {"fingerprint": "0" * 32}))
    with pytest.raises(RefusedError, match="was edited: fingerprint is 000"):
        open_run(job("finished"))


def edited(name: str, **keys: object) -> None:
    """Rewrite a record as another version would have written it, its digests right."""
    record = read_run_file(name)
    for old, new in keys.items():
        record[old] = new(record[old]) if callable(new) else new
    record["recipe_digest"] = config_fingerprint.digest_of(record["recipe"])
    parts = [record["recipe_digest"], record["manifest_digest"], record["items_per_shard"]]
    Path(name, "run.json").write_text(json.dumps(record | {"fingerprint": config_fingerprint.digest_of(parts)}))


def test_a_section_that_was_renamed_is_found_by_its_old_name(folder, monkeypatch) -> None:
    config = job("finished")

    def old_words(data: dict) -> dict:
        if "sampling" in data:
            return {**{k: v for k, v in data.items() if k != "sampling"}, "drawing": data["sampling"]}
        return {f"drawing.{key[9:]}" if key.startswith("sampling.") else key: value for key, value in data.items()}

    edited("finished", config=old_words, recipe=old_words)
    with pytest.raises(RefusedError, match=r"drawing.max_new_tokens: 4 there, null here"):
        plan_run(config)
    monkeypatch.setattr(run_record, "RENAMED_KEYS", {**run_record.RENAMED_KEYS, "drawing": "sampling"})
    assert plan_run(config).resumed
    assert recorded_config(read_run_file("finished"), source="x") == config


def test_a_fact_that_was_not_recorded_orphans_no_run(folder) -> None:
    edited("finished", recipe=lambda fields: {k: v for k, v in fields.items() if k != "versions.decord"})
    assert plan_run(job("finished")).resumed
    edited("finished", recipe=lambda fields: fields | {"versions.torch": "1.0"})
    with pytest.raises(RefusedError, match=r"versions.torch: \"1.0\" there"):
        plan_run(job("finished"))


@pytest.mark.parametrize("name", RUNS)
def test_another_release_orphans_no_run(folder, name) -> None:
    edited(name, recipe=lambda fields: fields | {"versions.illava": "9.9"})
    assert plan_run(job(name)).resumed
    if name not in {"interrupted", "documents"}:
        assert begin_retry(name, only=["worker_died"]).resumed


def test_another_release_resumes_retries_and_compares_as_the_same(folder, monkeypatch) -> None:
    monkeypatch.setattr(config_fingerprint, "_version", (VERSIONS | {"illava": "9.9"}).get)
    monkeypatch.setattr(sessions, "__version__", "9.9")
    assert run_job(job("interrupted")).num_done_before == 3
    assert continue_run(begin_retry("finished")).stats.num_rows == 2
    assert violations("interrupted") == violations("finished") == []
    assert {json.loads(path.read_text()).get("illava_version") for path in Path("finished", "sessions").iterdir()} == {
        None,
        "9.9",
    }
    edited("questions_merged", recipe=lambda fields: fields | {"versions.illava": "9.9"})
    assert list(compare_runs("questions", "questions_merged").differing_config) == ["reduction"]


def test_a_change_of_behaviour_counts_also_against_runs_that_were_made_before_it(folder, monkeypatch) -> None:
    """Unlike a fact, which counts where both fingerprints state it. To see this fail: let `is_fact` take it."""
    run_job(job("questions", uri="before"))
    monkeypatch.setitem(config_fingerprint.BEHAVIOUR, "orientation", 1)
    for name in ("finished", "before"):
        with pytest.raises(RefusedError) as caught:
            plan_run(job("questions" if name == "before" else name, uri=name))
        lines = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
        assert lines == ["  behaviour.orientation: null there, 1 here"]
    run_job(job("questions", uri="after"))
    assert plan_run(job("questions", uri="after")).resumed
    assert (
        recorded_config_fingerprint(read_run_file("after"))
        == config_fingerprint.resolve_config_fingerprint(job("questions")).of_kinds({"image", "video"}).fields
    )
    assert compare_runs("before", "after").differing_config == {"behaviour.orientation": (None, 1)}
    monkeypatch.delitem(config_fingerprint.BEHAVIOUR, "orientation")
    with pytest.raises(RefusedError, match=r"behaviour.orientation: 1 there, null here"):
        plan_run(job("questions", uri="after"))


def test_a_manifest_of_fewer_columns_holds_the_same_items(folder, monkeypatch) -> None:
    """A later column tells the item's language; nobody's own columns are taken for it."""

    def freeze(columns, **counts):
        languages = pa.chunked_array([pa.array(["en"] * len(columns["item_id"]), pa.string())])
        return frozen(columns | {"language": languages}, **counts)

    frozen = manifest.freeze
    monkeypatch.setitem(manifest.COLUMNS, "language", pa.string())
    monkeypatch.setattr("pipeline.inputs.build_manifest.freeze", freeze)
    run = plan_run(job("questions"))
    assert run.resumed
    assert run.manifest.table["language"].to_pylist() == [None, None]
    assert violations("questions") == []
    monkeypatch.setattr(
        "pipeline.inputs.build_manifest.freeze",
        lambda columns, **c: freeze(columns | {"field:own": columns["item_id"]}),
    )
    with pytest.raises(RefusedError, match="input: 2 items there, 2 here"):
        plan_run(job("questions"))


def test_every_column_that_27c8a0a_had_not_is_declared_with_its_version() -> None:
    """A column that is only added, as `pipeline.runs.row_schema` asks for. To see this fail: add one to `ResultRow`."""
    stored = pq.read_schema(DATA / "finished" / "data" / "part-00000.parquet")
    assert schema_of(FIRST_SCHEMA_VERSION).equals(stored.remove_metadata())
    assert max([FIRST_SCHEMA_VERSION, *LATER_COLUMNS.values()]) == SCHEMA_VERSION
    assert all(SCHEMA.field(name).nullable for name in LATER_COLUMNS if "." not in name)


def test_the_next_version_does_all_this_too_and_reads_nulls_in_what_is_new(folder) -> None:
    reading, writing = os.pipe()
    command = [sys.executable, str(NEXT_VERSION), ",".join(RUNS), json.dumps(VERSIONS), str(writing)]
    path = os.pathsep.join(sys.path)
    before = parts("interrupted") | parts("questions")
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, pass_fds=[writing], capture_output=True, text=True, check=False
    )
    os.close(writing)
    assert done.returncode == 0, done.stderr
    with os.fdopen(reading) as answer:
        said = json.load(answer)
    assert {name for name, found in said["verified"]["before"].items() if found} == {"interrupted", "retrying"}
    assert {name for name in RUNS if said["verified"][name]} == set()
    assert said["resumed"] == 3
    assert said["retried"] == [2, 2, 0]
    assert said["merged_again"] == 2
    assert said["stages"] == {"interrupted": [7.0] * 4, "questions": []}
    assert [row[1] for row in said["rows"]["interrupted"]] == [None, None, None, 7.0, 7.0, 7.0]
    assert [row[1] for row in said["rows"]["finished"]] == [None, 7.0, None, 7.0, None, None], "kept rows know nothing"
    for name in RUNS:
        assert len({(fingerprint, plan) for *_, fingerprint, plan in said["rows"][name]}) == 1
    assert said["page"] is None
    assert said["compared"] == ["reduction"]
    assert said["scored"] == 2
    assert (said["num_excluded"], said["num_excluded_under_a_penalty"]) == (3, 0), "a broken file counts, too"
    assert "sampling.next_penalty: 1.0 there, 1.5 here\n" in said["refused"]
    assert said["refused"].count(" there, ") == 1
    assert (parts("interrupted") | parts("questions")).items() >= before.items()
    _judge_the_readers("interrupted")
    _judge_todays_program("finished")


def _judge_the_readers(name: str) -> None:
    """The snippets of docs/operations.md on a folder whose second part has a column more."""
    files = sorted(glob.glob(f"{name}/data/*.parquet"))
    rows = pandas.read_parquet(f"{name}/data")
    assert (len(rows), "words_s" in rows) == (6, False), "the columns of the first part"
    rows = pandas.concat(map(pandas.read_parquet, files))
    assert rows.words_s.isna().tolist() == [True] * 3 + [False] * 3
    found = duckdb.sql(f"SELECT words_s FROM read_parquet('{name}/data/*.parquet', union_by_name = true) ORDER BY 1")
    assert found.fetchall() == [(7.0,)] * 3 + [(None,)] * 3
    assert pq.read_table(f"{name}/data").num_rows == 6


def _judge_todays_program(name: str) -> None:
    """This program on a run that a newer one went on with: it reads what it knows, and destroys nothing."""
    [first, *_] = result_rows(next(read_parts(name, list_parts(name))))
    assert not hasattr(first, "words_s")
    assert run_status(name).totals.num_rows == 6
    write_report(name)
    assert {line.partition(":")[0] for line in violations(name)} == {"newer_schema", "wrong_totals"}
    before = parts(name)
    with pytest.raises(
        RefusedError, match=f"rows of schema version {SCHEMA_VERSION + 1}; this program knows {SCHEMA_VERSION}"
    ):
        continue_run(begin_retry(name))
    assert parts(name) == before

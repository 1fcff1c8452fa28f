"""What operators copy: the dashboard, the Kubernetes examples, the snippets that load results. Each is tried here."""

from __future__ import annotations

import glob
import json
import re
import shlex
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.cli import job_parser, overrides_of
from pipeline.config.load import load_config
from pipeline.execution.lease import QueueDepths
from pipeline.execution.ray.metrics import COUNTERS, GAUGES, STAGE_SECONDS, STAGES, JobGauges, RowMetrics
from pipeline.execution.reporting.summary import RunStats
from pipeline.execution.reporting.watch import EVERY_S, Watch
from pipeline.exit_codes import EXIT_CODES
from pipeline.records import ResultRow
from pipeline.runs.run import open_run
from tests.support.docs_pages import blocks
from tests.support.runs.run_folders import complete, make_config, make_row, put_media

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "configs" / "grafana" / "illava_jobs.json"
ALERTS = ROOT / "configs" / "prometheus" / "illava_alerts.yaml"
OPERATIONS = ROOT / "docs" / "operations.md"
EXPORTED = {
    *(f"ray_{name}_total" for name in COUNTERS),
    *(f"ray_{name}" for name in GAUGES),
    f"ray_{STAGE_SECONDS}_bucket",
}

# As they stand in docs/operations.md.
SNIPPETS = {
    "pandas": """
import pandas

rows = pandas.read_parquet(f"{RUN}/data")
failed = rows[rows.status == "failed"][["uri", "error_type", "error_message"]]
""",
    "duckdb": """
import duckdb
import fsspec

db = duckdb.connect()
db.register_filesystem(fsspec.url_to_fs(RUN)[0])  # s3:// and gs:// with the job's own credentials, without httpfs
rows = db.sql(f"SELECT * FROM read_parquet('{RUN}/data/*.parquet', union_by_name = true)")
kept = db.sql("SELECT status, count(*), sum(num_vision_tokens_kept) FROM rows GROUP BY status")
""",
    "datasets": """
import pyarrow.parquet
from datasets import Dataset

rows = Dataset(pyarrow.parquet.read_table(f"{RUN}/data").drop_columns("fields"))  # datasets has no type for a map
texts = rows.filter(lambda row: row["status"] == "ok").select_columns(["uri", "text"])
""",
}


class Recorder:
    """Stands for the cluster: metrics that keep what they were told."""

    def __init__(self) -> None:
        self.told: dict[str, list] = {}
        self.tags: dict[str, tuple] = {}

    def metric(self, kind, name, description, *, tag_keys, boundaries=None):
        self.told[name], self.tags[name] = [], tag_keys
        return _Metric(self, name, kind)


class _Metric:
    def __init__(self, recorder, name, kind) -> None:
        self._recorder, self._name, self._kind = recorder, name, kind

    def inc(self, value, tags) -> None:
        assert self._kind == "counter"
        assert value > 0
        self._tell(value, tags)

    def set(self, value, tags) -> None:
        assert self._kind == "gauge"
        self._tell(value, tags)

    def observe(self, value, tags) -> None:
        assert self._kind == "histogram"
        self._tell(value, tags)

    def _tell(self, value, tags) -> None:
        assert set(tags) == set(self._recorder.tags[self._name])
        self._recorder.told[self._name].append((value, tags))


@pytest.fixture
def row(tmp_path, model_folder) -> ResultRow:
    put_media(f"{tmp_path}/in", 1)
    run = open_run(make_config(model_folder, input={"uri": f"{tmp_path}/in"}, output={"uri": f"{tmp_path}/out"}))
    return make_row(run, 0, run.manifest.items[0], attempts=3)


def test_rows_are_counted_once_and_under_their_tags(row) -> None:
    recorder = Recorder()
    metrics = RowMetrics(recorder, job="nightly")
    metrics.add(row)
    metrics.add(replace(row, status="failed", error_type="corrupt_media", attempts=1, cost_usd=0.0))
    sums = {name: sum(value for value, _ in told) for name, told in recorder.told.items()}
    assert sums["illava_items"] == 2
    assert [tags["status"] for _, tags in recorder.told["illava_items"]] == ["ok", "failed"]
    assert [(value, tags["error_type"]) for value, tags in recorder.told["illava_failures"]] == [(1, "corrupt_media")]
    assert (sums["illava_vision_tokens"], sums["illava_vision_tokens_kept"]) == (2 * 1568, 1600)
    assert (sums["illava_decoder_tokens_kept"], sums["illava_generated_tokens"]) == (1120, 40)
    assert (sums["illava_retries"], sums["illava_items_cost_usd"]) == (2, 0.001)
    assert sums["illava_fetched_bytes"] == 2 * row.bytes_fetched > 0
    seconds = {tags["stage"]: value for value, tags in recorder.told[STAGE_SECONDS]}
    assert seconds == {stage: getattr(row, f"{stage}_s") for stage in STAGES}


def test_the_dashboard_shows_what_is_exported_and_nothing_else() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"\b(ray_illava_\w+)", " ".join(targets)))
    assert shown == EXPORTED
    assert "ray_illava_items_total" in dashboard["templating"]["list"][1]["query"]
    tags = set(re.findall(r"by \(([\w, ]+)\)", " ".join(targets)))
    assert tags == {"status", "le, stage", "role", "error_type"}


def test_the_alert_rules_ask_for_what_is_exported() -> None:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    rules = group["rules"]
    asked = " ".join(rule["expr"] for rule in rules)
    assert set(re.findall(r"\b(ray_illava_\w+)", asked)) <= EXPORTED
    assert set(re.findall(r"by \((\w+)\)", asked)) == {"job_name"}
    assert all({"summary", "next"} == rule["annotations"].keys() and rule["for"] for rule in rules)
    assert {rule["alert"] for rule in rules} <= set(re.findall(r"`(Illava\w+)`", OPERATIONS.read_text()))


def test_gauges_show_where_a_jobs_items_are_and_fall_to_nothing_at_its_end(tmp_path) -> None:
    recorder, stats = Recorder(), RunStats()
    executor = SimpleNamespace(capacity=None, actors={"vlm": 2, "reader": 3})
    watch = Watch(str(tmp_path), "session", 9, stats, JobGauges(recorder, job="nightly"))
    scheduler = SimpleNamespace(queue_depths=lambda capacity: QueueDepths(0, 0, 0, 0, None), num_in_work=4)
    stats.num_rows = 2
    watch._told_s -= EVERY_S
    watch.tick(scheduler, executor)
    now = {(name, tags.get("role")): value for name, told in recorder.told.items() for value, tags in told}
    assert now == {
        ("illava_planned_items", None): 9,
        ("illava_waiting_items", None): 3,
        ("illava_in_work_items", None): 4,
        ("illava_actors", "vlm"): 2,
        ("illava_actors", "reader"): 3,
    }
    watch.close()
    last = {(name, tags.get("role")): value for name, told in recorder.told.items() for value, tags in told}
    assert set(last.values()) == {0, 2}, "planned are those that were made"
    assert last["illava_planned_items", None] == 2


def commands(document: dict) -> list[list[str]]:
    """Every `python /app/jobs/...` below a manifest, as arguments."""
    found = []
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        if isinstance(value, str) and "python /app/" in value:
            line = value[value.index("python /app/") :].replace("\\\n", " ")
            found.append(shlex.split(line.replace("$NIGHT", "night-1")))
        elif isinstance(value, (dict, list)):
            found += commands(value)
        assert key is not None
    return found


@pytest.mark.parametrize("name", ["rayjob", "nightly"])
def test_kubernetes_examples_run_commands_that_exist(name) -> None:
    path = ROOT / "configs" / "kuberay" / f"{name}.yaml"
    document = yaml.safe_load(path.read_text())
    (command,) = commands(document)
    assert (ROOT / command[1].removeprefix("/app/")).is_file()
    options = job_parser("").parse_args(command[2:])
    assert options.one_line
    mounted = re.search(r"--from-file=job.yaml=(\S+)", path.read_text())
    assert options.config == "/etc/illava/job.yaml"
    config = load_config(str(ROOT / mounted[1]), overrides_of(options))
    if name == "nightly":
        assert config.output.uri.startswith(config.input.exclude_runs)
        rules = document["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
        codes = {str(code) for rule in rules for code in rule["onExitCodes"]["values"]}
        assert codes <= set(re.findall(r"\b\d+\b", EXIT_CODES))
    else:
        pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        (ray,) = [pin for pin in pins if pin.startswith("ray[")]
        assert ray.partition("==")[2].removesuffix(".*") in document["spec"]["rayClusterSpec"]["rayVersion"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> str:
    """A finished run of 23 items in three parts, of which two items failed."""
    folder = tmp_path_factory.mktemp("results")
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2_vl"}')
    put_media(f"{folder}/in", 23)
    run = open_run(make_config(model, input={"uri": f"{folder}/in"}, output={"uri": f"{folder}/out"}))
    complete(run)
    return run.uri


@pytest.fixture(params=["one version", "a newer first part", "a newer last part"])
def folder(request, results, tmp_path) -> str:
    """The run, all of one version; or a part with a column more, as a newer version resumes or retries a run."""
    shutil.copytree(results, tmp_path / "out")
    parts = sorted(tmp_path.glob("out/data/*"))
    if request.param != "one version":
        part = parts[0 if "first" in request.param else -1]
        table = pq.read_table(part)
        pq.write_table(table.append_column("words_s", pa.array([7.0] * table.num_rows)), part)
    return str(tmp_path / "out")


@pytest.mark.parametrize("name", SNIPPETS)
def test_results_are_loaded_as_the_docs_say_of_one_version_or_of_two(folder, tmp_path, name, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert SNIPPETS[name].strip() in (ROOT / "docs" / "operations.md").read_text()
    found: dict = {"RUN": folder}
    exec(SNIPPETS[name], found)
    assert len(found["rows"]) == 23
    if name == "pandas":
        assert list(found["failed"].error_type) == ["corrupt_media"] * 2
    elif name == "duckdb":
        assert sorted(found["kept"].fetchall()) == [("failed", 2, 0), ("ok", 21, 16800)]
    else:
        assert len(found["texts"]) == 21
        assert found["texts"][0]["text"].startswith("text of ")


def test_the_readmes_pandas_line_shows_the_columns_of_all_versions(folder) -> None:
    line = "pandas.concat([pandas.read_parquet(part, filesystem=store) for part in parts])"
    [block] = [block for block in blocks("python") if line in block.text]
    found = {"RUN": folder}
    exec(block.text, found)
    rows = found["rows"]
    assert (len(rows), rows.item_id.is_unique) == (23, True)
    newer = {"words_s"} & set(pa.unify_schemas([pq.read_schema(part) for part in glob.glob(f"{folder}/data/*")]).names)
    assert newer <= set(rows.columns)
    if newer:
        assert 0 < rows.words_s.notna().sum() < 23

"""`illava report --without`: what is left out stands nowhere in the page. Time: 1 s."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.report.figures import run_figures
from pipeline.report.withhold import withhold
from pipeline.runs.parquet_sink import ParquetSink
from pipeline.runs.run import finish, open_run
from pipeline.storage import storage
from tests.support.runs.run_folders import failed_row, make_config, make_row, put_media

SECRETS = {"uri": "SECRETFOLDER", "prompt": "SECRETPROMPT"}


@pytest.fixture
def run(tmp_path, model_folder) -> str:
    """Two answered rows and a failed one, whose message names its file, as a load's does."""
    put_media(f"{tmp_path}/SECRETFOLDER", 3)
    task = {"kind": "caption", "prompt": "SECRETPROMPT?", "system_prompt": "SECRETPROMPT too"}
    sections = {"input": {"uri": f"{tmp_path}/SECRETFOLDER"}, "output": {"uri": f"{tmp_path}/out"}, "task": task}
    run = open_run(make_config(model_folder, **sections))
    items = run.shard(0).items
    rows = [
        make_row(run, 0, item, error_message=f"{item.uris[0]} is cut short", status="partial") for item in items[:2]
    ]
    ParquetSink(run).publish(0, [*rows, failed_row(run, 0, items[2])])
    finish(run, {})
    return run.uri


def report(run: str, *words: str) -> str:
    assert main(["report", run, *words]) == 0
    return storage.read(storage.join(run, "report.html")).decode()


@pytest.mark.parametrize("kind", SECRETS)
def test_what_is_left_out_stands_nowhere_and_the_rest_stays(run, kind) -> None:
    assert all(secret in report(run) for secret in SECRETS.values())
    page = report(run, "--without", kind)
    assert {name for name, secret in SECRETS.items() if secret in page} == SECRETS.keys() - {kind}
    assert "(left out)" in page
    figures = run_figures(run, num_samples=6)
    assert SECRETS[kind] in str(figures.record["config"])
    assert SECRETS[kind] not in str(withhold(figures, frozenset({kind}))), "whatever the page comes to show"
    assert "text of " in page


def test_without_frames_no_medium_is_read(run, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("pipeline.report.write.item_pictures", lambda *_, **__: pytest.fail("media were read"))
    assert "SECRETPROMPT" in report(run, "--without", "frames")
    assert main(["report", run, "--without", "frames", "--overlays", "1"]) == 2
    assert "leave out one of them" in capsys.readouterr().err
    assert Path(tmp_path, "out", "report.html").exists()

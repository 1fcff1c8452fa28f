"""Tests `python -m pipeline status`: how far a run is, and that a folder without a run is refused."""

import pytest

from pipeline.__main__ import main
from pipeline.errors import RefusedError
from pipeline.inspection.status import render_status, run_status, runs_status
from pipeline.runs.run import open_run
from pipeline.storage import storage
from tests.support.runs.run_folders import complete, make_config, put_media


def test_status_of_an_unfinished_and_a_finished_run(model_folder, root):
    put_media(storage.join(root, "in"), 10)
    sections = {"input": {"uri": storage.join(root, "in")}, "output": {"uri": storage.join(root, "out")}}
    run = open_run(make_config(model_folder, **sections))
    status = run_status(run.uri)
    assert (status.finished, status.num_shards_done, status.num_shards, status.totals.num_rows) == (False, 0, 3, 0)
    assert "none yet" in render_status(status)
    complete(run, shards=[0, 2])
    status = run_status(run.uri)
    assert (status.finished, status.num_shards_done) == (False, 2)
    assert status.totals.by_status == {"failed": 1, "ok": 5}
    assert "same command resumes" in render_status(status)
    complete(run)
    status = run_status(run.uri)
    assert status.finished
    assert status.totals.by_error_type == {"corrupt_media": 1}
    text = render_status(status)
    assert "3 of 3" in text
    assert "1 corrupt_media" in text
    assert "35.7%" in text


def test_status_of_no_run_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="holds no run"):
        run_status(str(tmp_path))


def test_status_of_a_folder_has_a_line_a_run_and_the_totals(model_folder, root, capsys):
    put_media(storage.join(root, "in"), 10)
    dataset = storage.join(root, "captions")
    for name, shards in (("a", None), ("b", [0])):
        sections = {"input": {"uri": storage.join(root, "in")}, "output": {"uri": storage.join(dataset, name)}}
        complete(open_run(make_config(model_folder, **sections)), shards=shards)
    first, second = runs_status(dataset)
    assert (first.finished, second.finished) == (True, False)
    assert first.totals == run_status(first.uri).totals, "_RUN.json says what the parts say"
    assert main(["status", dataset + "/"]) == 0
    one, other, total = capsys.readouterr().out.splitlines()
    assert one.startswith(f"{dataset}/a  ")
    assert "10 of 10 rows, 1 failed, finished, next: illava retry" in one
    assert "4 of 10 rows, unfinished, next: the job's own command again: illava caption" in other
    assert total == "2 runs (1 finished, 1 unfinished): 14 of 20 rows (13 ok, 0 partial, 1 failed)"
    assert main(["status", first.uri + "//"]) == 0
    assert capsys.readouterr().out.startswith(f"{first.uri}: finished\n")
    assert main(["status", storage.join(root, "in")]) == 4

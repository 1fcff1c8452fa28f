"""Tests `python -m pipeline status`: how far a run is, and that a folder without a run is refused."""

import pytest

from pipeline.errors import RefusedError
from pipeline.runs.run import open_run
from pipeline.runs.status import render_status, run_status
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
    assert "51.0%" in text


def test_status_of_no_run_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="holds no run"):
        run_status(str(tmp_path))

"""Tests incremental runs: items that earlier runs of a dataset hold are left out of the next one."""

import pytest

from pipeline.errors import InputError
from pipeline.runs.run import open_run, plan_run
from pipeline.storage import storage
from tests.support.runs.run_folders import complete, put_media


def test_items_a_finished_run_holds_are_left_out(config, root):
    media, old = storage.join(root, "in"), storage.join(root, "out-1")
    put_media(media, 12)
    new = {"uri": media, "exclude_runs": old}
    with pytest.raises(InputError, match="holds no run"):
        plan_run(config(input=new))
    first = open_run(config(input={"uri": media}, output={"uri": old}))
    complete(first)  # its tenth item failed by what its file is
    put_media(media, 2, start=12)
    left = plan_run(config(input=new)).manifest
    assert [item.uris[0][-12:] for item in left.items] == ["clip-012.mp4", "clip-013.mp4"]
    assert left.num_done == 12
    assert len(plan_run(config(input=new | {"limit": 1})).manifest) == 1
    other_recipe = config(input=new, seed=7)
    assert len(plan_run(other_recipe).manifest) == 14


def test_each_incremental_run_does_what_no_earlier_run_has_done(config, root):
    media, dataset = storage.join(root, "in"), storage.join(root, "captions")
    put_media(media, 4)

    def incremental_run(number, **changes):
        output = {"uri": storage.join(dataset, f"night-{number}"), "items_per_shard": 2}
        return open_run(config(input={"uri": media, "exclude_runs": dataset}, output=output, **changes))

    first = incremental_run(1)
    assert (len(first.manifest), first.manifest.num_done) == (4, 0)
    assert len(incremental_run(1).manifest) == 4  # its own folder does not count, so it resumes
    complete(first, shards=[0])  # and is interrupted
    put_media(media, 3, start=4)
    second = incremental_run(2)
    assert [item.uris[0][-7:] for item in second.manifest.items] == [f"{n:03d}.mp4" for n in range(2, 7)]
    complete(second)
    before = [storage.read(storage.join(first.uri, "data", "part-00000.parquet"))]
    third = incremental_run(3)
    assert (len(third.manifest), third.manifest.num_done) == (0, 7)
    complete(third)
    assert before == [storage.read(storage.join(first.uri, "data", "part-00000.parquet"))]
    assert len(incremental_run(4, seed=7).manifest) == 7


def test_an_incremental_run_knows_its_own_folder_however_it_is_written(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_media("in", 4)

    def incremental_run(uri):
        return open_run(
            config(input={"uri": "in", "exclude_runs": f"file://{tmp_path}/captions/"}, output={"uri": uri})
        )

    complete(incremental_run("captions/night-1"))
    assert incremental_run("./captions/night-1").resumed
    assert incremental_run("captions/night-2").manifest.num_done == 4


def test_runs_that_lie_deeper_than_they_are_looked_for_are_refused(config, tmp_path):
    media, dataset = storage.join(str(tmp_path), "in"), storage.join(str(tmp_path), "captions")
    put_media(media, 1)
    with pytest.raises(InputError, match="one folder deeper"):
        plan_run(config(input={"uri": media, "exclude_runs": dataset}, output={"uri": f"{dataset}/november/night-1"}))


def test_nothing_new_is_an_empty_manifest_not_an_error(config, root):
    media, old = storage.join(root, "in"), storage.join(root, "out")
    put_media(media, 3)
    complete(open_run(config(input={"uri": media}, output={"uri": old})))
    again = config(input={"uri": media, "exclude_runs": old}, output={"uri": storage.join(root, "out-2")})
    run = open_run(again)
    assert (len(run.manifest), run.num_shards) == (0, 0)
    complete(run)

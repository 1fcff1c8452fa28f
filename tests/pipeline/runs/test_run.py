"""Tests runs: created once, resumed by the same configuration, refused to any other; two drivers agree."""

import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import RefusedError, StorageError
from pipeline.runs.parquet_sink import ParquetSink
from pipeline.runs.run import finish, open_run, pending_shards, plan_run
from pipeline.runs.run_folder import is_finished
from pipeline.runs.run_record import read_run_file
from pipeline.storage import storage
from tests.support.runs.run_folders import complete, make_config, put_media, shard_rows


@pytest.fixture
def config(model_folder, root):
    put_media(storage.join(root, "in"), 10)

    def make(**changes):
        changes.setdefault("input", {})
        changes.setdefault("output", {})
        changes["input"] = {"uri": storage.join(root, "in")} | changes["input"]
        changes["output"] = {"uri": storage.join(root, "out")} | changes["output"]
        return make_config(model_folder, **changes)

    return make


def test_shards_follow_manifest_order_and_size_alone(config):
    run = open_run(config())
    assert (run.num_shards, run.resumed, run.attempt) == (3, False, 1)
    assert [len(run.shard(n).items) for n in range(3)] == [4, 4, 2]
    assert [item for n in range(3) for item in run.shard(n).items] == list(run.manifest.items)
    with pytest.raises(IndexError):
        run.shard(3)


def test_planning_writes_nothing(config, root):
    run = plan_run(config())
    assert run.num_shards == 3
    assert storage.list_names(storage.join(root, "out")) == []
    assert plan_run(config()).fingerprint == open_run(config()).fingerprint


def test_the_same_command_resumes_where_parts_are_missing(config, root):
    run = open_run(config())
    complete(run, shards=[1])
    again = open_run(config())
    assert again.resumed
    assert (again.fingerprint, again.nonce, again.manifest.items) == (run.fingerprint, run.nonce, run.manifest.items)
    assert pending_shards(again) == [0, 2]
    with pytest.raises(StorageError, match="2 shards have no part yet, the first is 0"):
        finish(again, {})
    assert not is_finished(again.uri)
    complete(again)
    assert pending_shards(open_run(config())) == []
    assert is_finished(again.uri)
    names = storage.list_names(storage.join(root, "out"))
    assert names == ["_RUN.json", "data/", f"manifest-{run.manifest.digest}.parquet", "run.json"]


def test_files_with_other_names_are_no_parts(config):
    run = open_run(config())
    for name in ("part-1.parquet", "part-00001.parquet.bak", ".part-00001.parquet~x.tmp", "part-000001.parquet"):
        storage.write_atomic(storage.join(run.uri, "data", name), b"x")
    assert pending_shards(run) == [0, 1, 2]


def test_a_changed_input_is_refused_and_leaves_the_run_as_it_is(config, root):
    run = open_run(config())
    complete(run, shards=[1])
    put_media(storage.join(root, "in"), 1, start=10)
    with pytest.raises(RefusedError, match=r"(?s)input: 10 items there, 11 here.*exclude_runs") as caught:
        open_run(config())
    assert "model." not in str(caught.value)
    storage.delete(storage.join(root, "in", "clip-010.mp4"))
    assert open_run(config()).nonce == run.nonce


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"fingerprint": "x"}'])
def test_a_damaged_run_file_is_refused(config, root, content):
    storage.write_atomic(storage.join(root, "out", "run.json"), content)
    with pytest.raises(RefusedError, match=r"run\.json"):
        open_run(config())


def test_a_changed_manifest_is_refused(config):
    run = open_run(config())
    from pipeline.inputs.manifest import freeze, manifest_bytes

    table = run.manifest.table.slice(0, 9)
    other = manifest_bytes(freeze({n: table[n] for n in table.column_names}))
    storage.write_atomic(storage.join(run.uri, f"manifest-{run.manifest.digest}.parquet"), other)
    with pytest.raises(RefusedError, match="changed after it was frozen"):
        open_run(config())


def test_drivers_that_start_together_share_one_run(config):
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: open_run(config()), range(4)))
    assert len({run.nonce for run in runs}) == 1
    assert read_run_file(runs[0].uri)["nonce"] == runs[0].nonce
    for run in runs:
        run.check_ownership()
    for run in runs[:2]:
        ParquetSink(run).publish(0, shard_rows(run, 0))
    assert pending_shards(runs[3]) == [1, 2]


def test_drivers_with_different_jobs_do_not_share(config):
    def attempt(seed):
        try:
            return open_run(config(seed=seed))
        except RefusedError:
            return None

    with ThreadPoolExecutor(4) as pool:
        opened = [run for run in pool.map(attempt, range(4)) if run is not None]
    assert len(opened) == 1


def test_a_driver_whose_folder_was_taken_over_publishes_nothing(config, root):
    run = open_run(config())
    record = read_run_file(run.uri) | {"attempt": 2}
    storage.write_atomic(storage.join(root, "out", "run.json"), json.dumps(record).encode())
    with pytest.raises(RefusedError, match="attempt 2"):
        ParquetSink(run).publish(0, shard_rows(run, 0))
    assert pending_shards(run) == [0, 1, 2]
    assert open_run(config()).attempt == 2


def test_finish_counts_rows_from_the_parts(config):
    run = open_run(config())
    complete(run)
    record = json.loads(storage.read(storage.join(run.uri, "_RUN.json")))
    assert record["totals"]["by_status"] == {"failed": 1, "ok": 9}
    assert record["totals"]["by_error_type"] == {"corrupt_media": 1}
    assert record["totals"]["sums"]["num_vision_tokens"] == 9 * 1568
    assert record["totals"]["sums"]["cost_usd"] == pytest.approx(0.01)
    assert (record["num_items"], record["num_shards"], record["attempt"]) == (10, 3, 1)
    assert record["versions"]["versions.torch"]


def _die_before_or_after(config, before):
    """A driver killed exactly before or after its second publish becomes visible."""
    import os

    from pipeline.storage import local_files

    run = open_run(config)
    sink = ParquetSink(run)
    sink.publish(0, shard_rows(run, 0))
    replace = os.replace

    def die(*args):
        if not before:
            replace(*args)
        os._exit(9)

    local_files.os.replace = die
    sink.publish(1, shard_rows(run, 1))


@pytest.mark.parametrize(("before", "pending"), [(True, [1]), (False, [])])
def test_a_driver_killed_at_a_publish_loses_at_most_that_shard(model_folder, tmp_path, before, pending):
    put_media(str(tmp_path / "in"), 8)
    config = make_config(model_folder, input={"uri": str(tmp_path / "in")}, output={"uri": str(tmp_path / "out")})
    driver = multiprocessing.get_context("spawn").Process(target=_die_before_or_after, args=(config, before))
    driver.start()
    driver.join()
    assert driver.exitcode == 9
    run = open_run(config)
    assert pending_shards(run) == pending
    assert storage.temporaries(run.uri) == []  # opening swept what the dead driver left
    complete(run)
    assert is_finished(run.uri)


def test_dtype_auto_goes_on_in_the_dtype_that_the_run_was_opened_in(config, model_folder):
    """Until 27c8a0a ``auto`` was another one on CPU than on a GPU, so a run may hold another than today's."""
    (model_folder / "config.json").write_text('{"model_type": "qwen2_vl", "dtype": "bfloat16"}')
    opened = open_run(config(model={"dtype": "float32"}))
    complete(opened, shards=[0])
    resumed = open_run(config(model={"dtype": "auto"}))
    assert (resumed.resumed, resumed.config.model.dtype, resumed.fingerprint) == (True, "float32", opened.fingerprint)
    with pytest.raises(RefusedError, match=r"model\.dtype: .float32. there, .bfloat16. here"):
        open_run(config(model={"dtype": "bfloat16"}))

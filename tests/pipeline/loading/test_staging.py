"""Tests objects on the local disk: fetched once, bounded, compared with the manifest, and removed afterwards."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ItemError, StorageError
from pipeline.loading.sparse_file import SparseCopy
from pipeline.loading.staging import Staging
from pipeline.storage import storage
from pipeline.storage.s3_read import PinnedObject


@pytest.fixture
def stage(tmp_path, request):
    def make(cache_bytes=10_000, max_object_bytes=5_000, **options):
        staging = Staging(
            cache_dir=str(tmp_path / "cache"), cache_bytes=cache_bytes, max_object_bytes=max_object_bytes, **options
        )
        request.addfinalizer(staging.close)
        return staging

    return make


def put(bucket, name, num_bytes):
    uri = f"{bucket}/{name}"
    storage.write_atomic(uri, name[:1].encode() * num_bytes)
    return storage.stat(uri)


def get(staging, info, **options):
    return staging.get(info.uri, size=info.size, etag=info.etag, **options)


def failure(staging, *args, **options):
    with pytest.raises(ItemError) as caught:
        staging.get(*args, **options)
    return caught.value.error_type


def folders(tmp_path):
    return sorted((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else []


def test_a_local_object_is_used_in_place(stage, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    info = storage.stat(str(tmp_path / "a"))
    staged = get(stage(), info)
    assert (staged.path, staged.bytes_fetched, staged.num_requests) == (str(tmp_path / "a"), 0, 0)
    assert folders(tmp_path) == []


def test_a_local_object_is_compared_with_the_manifest(stage, tmp_path):
    path = str(tmp_path / "a")
    Path(path).write_bytes(b"x" * 10)
    etag = storage.stat(path).etag
    assert failure(stage(), path, size=11) == "changed_object"
    assert failure(stage(), path, size=10, etag="mtime:1") == "changed_object"
    assert failure(stage(), path + "-none") == "not_found"
    assert failure(stage(max_object_bytes=9), path, size=10, etag=etag) == "too_large"
    assert failure(stage(allowed_roots=[str(tmp_path / "other")]), path) == "unsafe_uri"
    assert failure(stage(), "http://127.0.0.1/a.mp4") == "unsafe_uri"


def test_an_object_is_fetched_once_and_counted(stage, s3_bucket):
    info, staging = put(s3_bucket, "a", 100), stage()
    first = get(staging, info)
    assert Path(first.path).read_bytes() == b"a" * 100
    assert (first.bytes_fetched, first.num_requests) == (100, 1)
    again = get(staging, info)
    assert (again.path, again.bytes_fetched, again.num_requests) == (first.path, 0, 0)


def test_an_object_is_compared_with_the_manifest(stage, s3_bucket, tmp_path):
    old = put(s3_bucket, "a", 100)
    put(s3_bucket, "a", 101)
    staging = stage()
    assert failure(staging, old.uri, size=100, etag=old.etag) == "changed_object"
    assert failure(staging, old.uri, size=100) == "changed_object"
    assert failure(staging, f"{s3_bucket}/none", size=5) == "not_found"
    assert failure(staging, old.uri, size=5_001) == "too_large"
    assert failure(stage(max_object_bytes=100), old.uri) == "too_large"  # the size is asked for where it is unknown
    leftovers = [path.name for folder in folders(tmp_path) for path in folder.iterdir()]
    assert leftovers == ["owner.lock"]


def test_the_least_recently_used_copy_makes_room(stage, s3_bucket):
    staging = stage(cache_bytes=250)
    a, b, c = (put(s3_bucket, name, 100) for name in "abc")
    path_a, path_b = get(staging, a).path, get(staging, b).path
    get(staging, a)
    path_c = get(staging, c).path
    assert [os.path.exists(path) for path in (path_a, path_b, path_c)] == [True, False, True]
    assert get(staging, b).bytes_fetched == 100


def test_images_of_one_set_do_not_push_each_other_out(stage, s3_bucket):
    staging = stage(cache_bytes=250)
    a, b, c = (put(s3_bucket, name, 100) for name in "abc")
    kept = [get(staging, a).path]
    kept.append(get(staging, b, keep=kept).path)
    with pytest.raises(ItemError, match="cache_bytes") as caught:
        get(staging, c, keep=kept)
    assert caught.value.error_type == "too_large"
    assert all(map(os.path.exists, kept))


def test_nothing_is_left_after_closing(stage, s3_bucket, tmp_path):
    info, staging = put(s3_bucket, "a", 100), stage()
    get(staging, info)
    assert len(folders(tmp_path)) == 1
    staging.close()
    assert folders(tmp_path) == []
    assert get(staging, info).bytes_fetched == 100


def test_what_a_killed_reader_left_is_swept_and_a_living_one_is_not(stage, s3_bucket, tmp_path):
    info, living = put(s3_bucket, "a", 100), stage()
    living_path = get(living, info).path
    code = (
        "import os, sys; from pipeline.loading.staging import Staging; "
        "s = Staging(cache_dir=sys.argv[1], cache_bytes=1000, max_object_bytes=1000); "
        "print(s.get(sys.argv[2]).path, flush=True); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), info.uri]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    dead = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=False)
    assert dead.returncode == -9
    dead_path = dead.stdout.strip()
    assert os.path.exists(dead_path)
    get(stage(), info)
    assert not os.path.exists(os.path.dirname(dead_path))
    assert os.path.exists(living_path)


def test_a_disk_that_cannot_be_written_stops_the_run(s3_bucket, tmp_path):
    (tmp_path / "file").touch()
    info = put(s3_bucket, "a", 100)
    staging = Staging(cache_dir=str(tmp_path / "file"), cache_bytes=1000, max_object_bytes=1000)
    with pytest.raises(StorageError, match=r"runtime\.cache_dir"):
        get(staging, info)


def test_a_full_disk_stops_the_run_instead_of_failing_items(stage, s3_bucket, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    info, staging = put(s3_bucket, "a", 100), stage()
    sparse = staging.sparse(info.uri, size=info.size, etag=info.etag)
    monkeypatch.setattr(PinnedObject, "copy", lambda *_, **__: full())
    with pytest.raises(StorageError, match=r"no space is left below .*runtime\.cache_bytes.*resumes"):
        get(staging, info)
    monkeypatch.setattr(SparseCopy, "fetch", full)
    with pytest.raises(StorageError, match="no space is left below"):
        staging.fill(sparse, [(0, 10)])

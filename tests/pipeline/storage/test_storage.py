"""Tests storage: the same results from a local folder and from S3 over HTTP; one winner of many, no torn write."""

import errno
import multiprocessing
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import ItemError, StorageError
from pipeline.storage import local_files, storage


def test_written_objects_are_listed_read_and_deleted(root):
    names = ["a.mp4", "b.txt", "sub/c.mp4", "sub/deep/d [1]*.mp4"]
    for name in names:
        storage.write_atomic(storage.join(root, name), name.encode())
    found = storage.list_objects(root, "**/*.mp4")
    assert [info.uri for info in found] == [
        storage.join(root, n) for n in ["a.mp4", "sub/c.mp4", "sub/deep/d [1]*.mp4"]
    ]
    assert [info.size for info in found] == [5, 9, 19]
    assert all(info.etag and '"' not in info.etag for info in found)
    assert found[0] == storage.stat(found[0].uri)
    assert [i.uri for i in storage.list_objects(root, "*.mp4")] == [storage.join(root, "a.mp4")]
    assert [i.uri for i in storage.list_objects(root, "sub/*")] == [storage.join(root, "sub/c.mp4")]
    assert len(storage.list_objects(root, "**/*")) == 4
    assert storage.list_names(root) == ["a.mp4", "b.txt", "sub/"]
    assert storage.list_names(storage.join(root, "absent")) == []
    assert storage.read(storage.join(root, names[-1])) == names[-1].encode()
    storage.delete(storage.join(root, "a.mp4"))
    storage.delete(storage.join(root, "a.mp4"))
    assert not storage.exists(storage.join(root, "a.mp4"))
    assert storage.exists(storage.join(root, "b.txt"))


def test_nothing_is_cached_between_calls(root):
    uri = storage.join(root, "object")
    assert not storage.exists(uri)
    storage.write_atomic(uri, b"one")
    assert storage.stat(uri).size == 3
    storage.write_atomic(uri, b"three")
    assert storage.read(uri) == b"three"
    assert [info.size for info in storage.list_objects(root)] == [5]


def test_a_single_object_lists_itself(root):
    uri = storage.join(root, "clip.mp4")
    storage.write_atomic(uri, b"x")
    assert [info.uri for info in storage.list_objects(uri, "**/*.mkv")] == [uri]


@pytest.mark.parametrize(("start", "end", "expected"), [(0, 4, b"0123"), (8, 99, b"89"), (10, 12, b""), (3, 3, b"")])
def test_ranges_are_half_open_and_end_with_the_object(root, start, end, expected):
    uri = storage.join(root, "digits")
    storage.write_atomic(uri, b"0123456789")
    assert storage.read_range(uri, start, end) == expected


def test_fetch_copies_bytes_and_notices_a_changed_object(root, tmp_path):
    uri, copy = storage.join(root, "clip"), str(tmp_path / "copy")
    storage.write_atomic(uri, b"first" * 1000)
    etag = storage.stat(uri).etag
    assert storage.fetch(uri, copy, etag=etag) == (5000, 1)
    assert Path(copy).read_bytes() == b"first" * 1000
    storage.write_atomic(uri, b"other" * 1000)
    with pytest.raises(ItemError, match=r"expected etag") as caught:
        storage.fetch(uri, copy, etag=etag)
    assert caught.value.error_type == "changed_object"


@pytest.mark.parametrize("call", [storage.stat, storage.read, lambda uri: storage.read_range(uri, 0, 3)])
def test_an_absent_object_is_not_found_and_named(root, call):
    with pytest.raises(ItemError, match=r"absent\.mp4") as caught:
        call(storage.join(root, "absent.mp4"))
    assert (caught.value.error_type, caught.value.retryable) == ("not_found", False)


def test_a_prefix_is_not_an_object(root):
    storage.write_atomic(storage.join(root, "folder/x"), b"x")
    for call in (storage.read, lambda uri: storage.fetch(uri, os.devnull)):
        with pytest.raises(ItemError) as caught:
            call(storage.join(root, "folder"))
        assert caught.value.error_type == "not_found"


def test_create_exclusive_has_one_winner_among_many(root):
    uri = storage.join(root, "run.json")
    payloads = [f"driver {n}".encode() * 50 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda data: storage.create_exclusive(uri, data), payloads))
    assert sum(won) == 1
    assert storage.read(uri) == payloads[won.index(True)]
    assert not storage.create_exclusive(uri, b"late")
    assert storage.temporaries(root) == []


def test_a_driver_that_looked_too_early_never_overwrites(s3_bucket, monkeypatch):
    from pipeline.storage.object_store import ObjectStore

    uri = f"{s3_bucket}/run.json"
    storage.write_atomic(uri, b"first")

    def still_absent(*_):
        raise FileNotFoundError

    monkeypatch.setattr(ObjectStore, "info", still_absent)
    assert storage.create_exclusive(uri, b"second") is False
    assert storage.read(uri) == b"first"


def test_a_store_that_ignores_conditions_is_noticed_and_settles(s3_bucket, monkeypatch):
    from pipeline.storage.object_store import ObjectStore

    plain = storage._backend(s3_bucket).filesystem

    class Unconditional:
        def __getattr__(self, name):
            return getattr(plain, name)

        def pipe_file(self, uri, data, mode="overwrite"):
            plain.pipe_file(uri, data)

    monkeypatch.setattr(storage, "_backend", lambda uri: ObjectStore(Unconditional()))
    waited = []
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=waited.append))  # other threads sleep on
    uri = f"{s3_bucket}/run.json"
    assert storage.create_exclusive(uri, b"mine") is True
    assert waited == [storage._SETTLE_S]
    assert storage.create_exclusive(uri, b"theirs") is False
    storage.delete(uri)
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=lambda _: plain.pipe_file(uri, b"a later writer")))
    assert storage.create_exclusive(uri, b"mine") is False


def test_a_file_system_without_links_still_decides(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(storage, "_SETTLE_S", 0.0)
    assert storage.create_exclusive(str(tmp_path / "run.json"), b"mine") is True


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    target = tmp_path / "part.parquet"
    storage.write_atomic(str(target), b"before")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*free some space"):
        storage.write_atomic(str(target), b"after")
    assert target.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["part.parquet"]


def _die_while_writing(path):
    os.replace = lambda *_: os._exit(9)
    local_files.write(path, b"never seen")


def test_a_writer_killed_before_the_rename_is_invisible_and_swept(tmp_path):
    target = str(tmp_path / "data" / "part-00000.parquet")
    writer = multiprocessing.get_context("spawn").Process(target=_die_while_writing, args=(target,))
    writer.start()
    writer.join()
    assert writer.exitcode == 9
    assert len(storage.temporaries(str(tmp_path))) == 1
    assert storage.list_objects(str(tmp_path)) == []
    mine = tmp_path / "data" / f".x~{socket.gethostname()}~{os.getpid()}~00.tmp"  # a live writer's
    mine.touch()
    assert len(storage.sweep_temporaries(str(tmp_path))) == 1
    assert storage.temporaries(str(tmp_path)) == [str(mine)]

"""Storage: the same results from a local folder and from S3 over HTTP; faults mapped to the pipeline's errors."""

import errno
import multiprocessing
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import CredentialsError, ItemError, StorageError
from pipeline.storage import local_files


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
    monkeypatch.setattr(storage.time, "sleep", waited.append)
    uri = f"{s3_bucket}/run.json"
    assert storage.create_exclusive(uri, b"mine") is True
    assert waited == [storage._SETTLE_S]
    assert storage.create_exclusive(uri, b"theirs") is False
    storage.delete(uri)
    monkeypatch.setattr(storage.time, "sleep", lambda _: plain.pipe_file(uri, b"a later writer"))
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


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("", "empty"),
        ("http://host/x.mp4", "scheme 'http'"),
        ("memory://x/y", "scheme 'memory'"),
        ("simplecache::s3://bucket/x", "chains"),
        ("s3://bucket/zip::x", "chains"),
        ("s3://user:pw@bucket/x", "user info"),
        ("s3://bucket/a\nb", "control characters"),
        ("s3://bucket/a\u2028b", "control characters"),
        ("s3://bucket\\x", "backslashes"),
        ("s3://b", "scheme://bucket/key"),
        ("s3:///key", "scheme://bucket/key"),
        ("s3:/bucket/key", "scheme://bucket/key"),
        ("S3://bucket/key", "scheme://bucket/key"),
        ("s3://bucket/key?versionId=1", "versions"),
        ("/data/../etc/passwd", "segments"),
        ("s3://bucket/../other", "segments"),
        ("file://host/etc/passwd", "file:///path"),
        ("concat:/a|/b", "scheme 'concat'"),
        ("/data/\udcff.mp4", "Unicode"),
    ],
)
def test_unsafe_addresses_are_refused_with_the_reason(uri, reason):
    with pytest.raises(ItemError, match=reason) as caught:
        storage.check_uri(uri)
    assert caught.value.error_type == "unsafe_uri"
    str(caught.value).encode()


def test_local_addresses_stay_below_their_roots_after_links_are_resolved(tmp_path):
    inside, outside = tmp_path / "media", tmp_path / "secret"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "link.mp4").symlink_to(outside)
    (inside / "ok.mp4").touch()
    (tmp_path / "media-other").touch()
    roots = [str(inside)]
    assert storage.check_uri(f"file://{inside}/ok.mp4", allowed_roots=roots) == str(inside / "ok.mp4")
    assert storage.check_uri("s3://bucket/x", allowed_roots=roots) == "s3://bucket/x"
    for path in (inside / "link.mp4", outside, tmp_path / "media-other"):
        with pytest.raises(ItemError, match="outside the allowed folders"):
            storage.check_uri(str(path), allowed_roots=roots)
    with pytest.raises(ItemError):
        storage.check_uri(str(inside / "ok.mp4"), allowed_roots=[])


def test_a_missing_bucket_stops_the_run(s3_environment):
    with pytest.raises(StorageError, match="NoSuchBucket"):
        storage.write_atomic("s3://no-such-bucket-here/x", b"x")
    with pytest.raises(StorageError, match="check the address"):
        storage.list_objects("s3://no-such-bucket-here/prefix")
    with pytest.raises(StorageError):
        storage.list_names("s3://no-such-bucket-here/prefix")


@pytest.fixture
def fake_store(s3_environment, monkeypatch):
    """A server whose answers a test scripts: a list of (status, error code or None, body), the last one repeated."""
    answers, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            status, code, body = answers.pop(0) if len(answers) > 1 else answers[0]
            seen.append(self.command)
            if code:
                body = f"<Error><Code>{code}</Code><Message>says {code}</Message></Error>".encode()
            self.send_response(status)
            short = body.startswith(b"SHORT")
            self.send_header("Content-Length", str(len(body) + (100 if short else 0)))
            self.send_header("ETag", '"abc"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            if short:
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = _answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield answers, seen
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (503, "ServiceUnavailable")])
def test_a_store_that_stumbles_is_asked_again(fake_store, status, code):
    answers, seen = fake_store
    answers += [(status, code, b""), (206, None, b"data")]
    assert storage.read_range("s3://bucket/x", 0, 4) == b"data"
    assert seen == ["GET", "GET"]


def test_a_store_that_keeps_failing_is_given_up_in_words(fake_store):
    answers, seen = fake_store
    answers.append((503, "SlowDown", b""))
    with pytest.raises(ItemError, match=r"s3://bucket/x.*SlowDown") as caught:
        storage.read_range("s3://bucket/x", 0, 4)
    assert (caught.value.error_type, caught.value.retryable) == ("store_error", True)
    assert len(seen) == 2  # AWS_MAX_ATTEMPTS, and no second layer of retries above it
    with pytest.raises(StorageError, match="cannot write"):
        storage.write_atomic("s3://bucket/x", b"x")


def test_a_body_that_ends_early_is_read_again(fake_store, monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    answers, _ = fake_store
    answers += [(206, None, b"SHORT"), (206, None, b"data")]
    assert storage.read_range("s3://bucket/x", 0, 4) == b"data"
    answers[:] = [(206, None, b"SHORT")]
    with pytest.raises(ItemError) as caught:
        storage.read_range("s3://bucket/x", 0, 4)
    assert caught.value.error_type == "store_error"


@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "InvalidAccessKeyId")])
def test_bad_credentials_stop_the_run_instead_of_failing_items(fake_store, status, code):
    fake_store[0].append((status, code, b""))
    for call in (storage.stat, storage.read, storage.list_objects, lambda u: storage.write_atomic(u, b"x")):
        with pytest.raises(CredentialsError, match=rf"{code}.*expired") as caught:
            call("s3://bucket/x")
        assert "testing-secret-value" not in str(caught.value)


def test_a_forbidden_object_is_one_failed_item(fake_store):
    fake_store[0].append((403, "AccessDenied", b""))
    for call in (storage.stat, storage.read, storage.exists):
        with pytest.raises(ItemError) as caught:
            call("s3://bucket/x")
        assert caught.value.error_type == "access_denied"


def test_missing_credentials_stop_the_run(s3_environment, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(CredentialsError):
        storage.read("s3://bucket/x")


def test_secrets_never_reach_a_message(monkeypatch):
    from pipeline.storage.errors import item_error

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    message = str(item_error("read", "s3://bucket/x", OSError("request with very-secret-value\x1b[31m failed")))
    assert "very-secret-value" not in message
    assert "\x1b" not in message

"""Tests that a store's faults become the pipeline's errors: tried again, given up with a message, or ending the run."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from pipeline.errors import CredentialsError, ItemError, StorageError
from pipeline.storage import storage


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
    monkeypatch.setattr(storage, "time", SimpleNamespace(sleep=lambda _: None))
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

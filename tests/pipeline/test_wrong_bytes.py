"""A store that answers with other bytes than it should: short, long, of another version, or of two. None is handed out.

Seeded, over HTTP from a server of our own: two answers of each kind in `make test`, 500 in `make test-long`.
"""

import base64
import hashlib
import re
import threading
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from pipeline import storage
from pipeline.errors import ItemError

SIZE = 20_000
OLD, NEW = (np.random.default_rng(seed).bytes(SIZE) for seed in (1, 2))
WRONG_BODIES = ("cut off", "short", "long", "mixed", "flipped bit")
WRONG_VERSIONS = ("changed", "changed, condition ignored")
WRONG_RANGES = ("another range", "whole body", "other size")


def tag_of(data):
    return hashlib.md5(data).hexdigest()


class Store(BaseHTTPRequestHandler):
    """Serves OLD, or what `server.fault` makes of it. `server.is_multipart`: a CRC-32 in place of the MD5."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        fault, rng = self.server.fault, self.server.rng
        data = NEW if fault in WRONG_VERSIONS else OLD
        etag = tag_of(data)
        if fault == "changed" and self.headers.get("If-Match", "").strip('"') not in {"", etag}:
            self._send(412, b"<Error><Code>PreconditionFailed</Code></Error>", headers={})
            return
        status, headers = 200, {"ETag": f'"{etag}"'}
        if self.server.is_multipart:
            etag = {OLD: "a" * 32 + "-2", NEW: "b" * 32 + "-2"}[data]
            headers = {
                "ETag": f'"{etag}"',
                "x-amz-checksum-crc32": base64.b64encode(zlib.crc32(OLD).to_bytes(4)).decode(),
            }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and fault != "whole body":
            start, end = int(wanted[1]), int(wanted[2]) + 1
            shift = 1 if fault == "another range" else 0
            size = SIZE + 1 if fault == "other size" else SIZE
            data, status = data[start + shift : end + shift], 206
            headers["Content-Range"] = f"bytes {start + shift}-{start + shift + len(data) - 1}/{size}"
            headers.pop("x-amz-checksum-crc32", None)
        self._send(status, *self._broken(data, fault, rng), headers=headers)

    def _broken(self, data, fault, rng):
        """The body, and how long its header says it is."""
        place = int(rng.integers(1, len(data)))
        if fault == "cut off":
            return data[:place], len(data)
        if fault == "short":
            return data[:place], place
        if fault == "long":
            return data + bytes(place), len(data) + place
        if fault == "mixed":
            return data[:place] + NEW[place : len(data)], len(data)
        if fault == "flipped bit":
            return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], len(data)
        return data, len(data)

    def _send(self, status, body, length=None, *, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None and length != len(body)


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(server, monkeypatch):
    """``s3://bucket/object`` there, of which any answer can be made wrong."""
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "testing-key-id",
        "AWS_SECRET_ACCESS_KEY": "testing-secret-value",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "_RETRY_S", 0.0)
    server.fault, server.is_multipart, server.rng = None, False, np.random.default_rng(0)
    return server


URI = "s3://bucket/object"


def read_whole(store, path):
    etag = "a" * 32 + "-2" if store.is_multipart else tag_of(OLD)
    fetched = storage.fetch(URI, str(path), etag=etag)
    return fetched.num_bytes == SIZE and path.read_bytes() == OLD


def read_parts(store, _path):
    etag = "a" * 32 + "-2" if store.is_multipart else tag_of(OLD)
    ranges = [(0, 5000), (7000, 7100), (12_000, 19_000)]
    found = storage.read_ranges(URI, ranges, size=SIZE, etag=etag)
    return found == [OLD[start:end] for start, end in ranges]


@pytest.mark.parametrize("is_multipart", [False, True], ids=["MD5", "CRC-32"])
@pytest.mark.parametrize("read", [read_whole, read_parts])
def test_right_answers_are_read(store, tmp_path, read, is_multipart):
    store.is_multipart = is_multipart
    assert read(store, tmp_path / "copy")


def wrong_answers():
    """(how it is read, what is wrong, whether the MD5 is hidden) of every kind a client can tell from what it gets.

    In S3's protocol ranges carry no checksum: bytes that a store swaps under the right tag cannot be told.
    """
    for is_multipart in (False, True):
        for fault in (*WRONG_BODIES, *WRONG_VERSIONS):
            yield read_whole, fault, is_multipart
        for fault in ("cut off", "short", "long", *WRONG_VERSIONS, *WRONG_RANGES):
            yield read_parts, fault, is_multipart


def refusal(read, store, path):
    """The error type; None where something was read."""
    try:
        read(store, path)
    except ItemError as error:
        return error.error_type
    return None


@pytest.mark.parametrize("num_answers", [52, pytest.param(500, marks=pytest.mark.long)])
def test_wrong_answers_give_no_byte(store, tmp_path, num_answers):
    kinds, num_refused = list(wrong_answers()), Counter()
    for seed in range(num_answers):
        read, fault, store.is_multipart = kinds[seed % len(kinds)]
        store.fault, store.rng = fault, np.random.default_rng(seed)
        expected = "changed_object" if fault in {*WRONG_VERSIONS, *WRONG_RANGES} else "store_error"
        assert refusal(read, store, tmp_path / "copy") == expected, (seed, read.__name__, fault, store.is_multipart)
        num_refused[fault] += 1
    assert num_refused.total() == num_answers
    assert set(num_refused) == {*WRONG_BODIES, *WRONG_VERSIONS, *WRONG_RANGES}

"""Runs an S3 server of our own that answers GET with wrong bytes, by a seeded plan for each object."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

WRONG_BODIES = ("cut off", "short", "long", "mixed", "flipped bit")
WRONG_VERSIONS = ("changed", "changed, condition ignored")
WRONG_RANGES = ("another range", "whole body", "other size")
ALWAYS = 1 << 30


@dataclass(slots=True)
class Served:
    """One object, in two versions of one size.

    Attributes:
        old: what the manifest names.
        new: what stands there after a change.
        fault: what is wrong with some answers.
        num_right: answers that are right before that.
        num_wrong: answers that are wrong then; later ones are right again.
        is_multipart: tagged by a tag that is no MD5, with a CRC-32 of the whole beside it.
        tag: of the old version, in place of its MD5.
        headers: of every answer.
        seed: of where bodies are cut or changed.
    """

    old: bytes
    new: bytes
    fault: str | None = None
    num_right: int = 0
    num_wrong: int = ALWAYS
    is_multipart: bool = False
    tag: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    seed: int = 0

    @property
    def etag(self) -> str:
        """That the manifest names."""
        return self._tag_of(self.old)

    def _tag_of(self, data: bytes) -> str:
        if self.is_multipart:
            return ("a" if data is self.old else "b") * 32 + "-2"
        return self.tag if self.tag and data is self.old else hashlib.md5(data).hexdigest()

    def answer(self, wanted_range: str, condition: str, count: int) -> tuple[int, dict[str, str], bytes, int]:
        """Status, headers, body and the length announced, of the ``count``-th answer."""
        fault = self.fault if self.num_right <= count < self.num_right + self.num_wrong else None
        data = self.new if fault in WRONG_VERSIONS else self.old
        etag = self._tag_of(data)
        if fault == "changed" and condition not in {"", etag}:
            body = b"<Error><Code>PreconditionFailed</Code></Error>"
            return 412, {}, body, len(body)
        status, headers = 200, {"ETag": f'"{etag}"', **self.headers}
        if self.is_multipart:
            headers["x-amz-checksum-crc32"] = base64.b64encode(zlib.crc32(self.old).to_bytes(4)).decode()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted_range)
        if wanted and fault != "whole body":
            start, end = int(wanted[1]), int(wanted[2]) + 1
            shift = 1 if fault == "another range" else 0
            size = len(data) + 1 if fault == "other size" else len(data)
            data, status = data[start + shift : end + shift], 206
            headers["Content-Range"] = f"bytes {start + shift}-{start + shift + len(data) - 1}/{size}"
            headers.pop("x-amz-checksum-crc32", None)
        return status, headers, *self._broken(data, fault, count)

    def _broken(self, data: bytes, fault: str | None, count: int) -> tuple[bytes, int]:
        place = int(np.random.default_rng((self.seed, count)).integers(1, len(data)))
        if fault == "cut off":
            return data[:place], len(data)
        if fault == "short":
            return data[:place], place
        if fault == "long":
            return data + bytes(place), len(data) + place
        if fault == "mixed":
            return data[:place] + self.new[place : len(data)], len(data)
        if fault == "flipped bit":
            return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], len(data)
        return data, len(data)


class WrongStore(ThreadingHTTPServer):
    """The server.

    Attributes:
        objects: ``/bucket/key`` -> what is served there.
        num_asked: of each, since it was put there.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Served] = {}
        self.num_asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """What a job needs to read from here."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}",
            "AWS_ACCESS_KEY_ID": "testing-key-id",
            "AWS_SECRET_ACCESS_KEY": "testing-secret-value",
            "AWS_DEFAULT_REGION": "eu-west-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def put(self, uri: str, served: Served) -> None:
        """Serve an object from now on, its answers counted from zero."""
        path = "/" + uri.removeprefix("s3://")
        self.objects[path], self.num_asked[path] = served, 0

    def count(self, path: str) -> int:
        """How many answers were given before this one."""
        with self._lock:
            self.num_asked[path] += 1
            return self.num_asked[path] - 1

    @contextmanager
    def serving(self) -> Iterator[WrongStore]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: WrongStore

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        served = self.server.objects[self.path]
        condition = self.headers.get("If-Match", "").strip('"')
        count = self.server.count(self.path)
        status, headers, body, length = served.answer(self.headers.get("Range", ""), condition, count)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length != len(body)

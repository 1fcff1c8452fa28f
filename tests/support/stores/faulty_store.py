"""Runs an HTTP proxy in front of an S3 server that answers some requests wrongly, as a store under trouble does.

The proxy tells requests apart by method and path only. A `Plan` decides what happens to each; all others pass through.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "429": (429, "TooManyRequestsException"),
    "expired": (400, "ExpiredToken"),
}
PASSING = ("500", "503", "429", "reset", "short")  # what another request may mend at once
Plan = Callable[
    [str, str], str | None
]  # method, path -> what happens: a key of ERRORS, reset, short, slow, hang, changed


class SomeFail:
    """Makes exactly ``in_ten`` of every ten requests fail; a seed decides which ones and how.

    Args:
        in_ten: number of failures.
        kinds: ways of failing.
        seed: seed of all draws.
    """

    def __init__(self, in_ten: int, kinds: tuple[str, ...] = PASSING, *, seed: int = 0) -> None:
        self._in_ten, self._kinds, self._draws, self._block = in_ten, kinds, random.Random(seed), []

    def __call__(self, method: str, path: str) -> str | None:
        if not self._block:
            self._block = [True] * self._in_ten + [False] * (10 - self._in_ten)
            self._draws.shuffle(self._block)
        return self._draws.choice(self._kinds) if self._block.pop() else None


class FaultyStore:
    """Is the proxy, while `serving`.

    Attributes:
        url: the endpoint to use.
        plan: decides what happens to the next requests; None lets all pass.
        num_requests: number of requests so far.
        faults: number of wrong answers, by kind.
    """

    def __init__(self, upstream: str) -> None:
        self.plan: Plan | None = None
        self.num_requests = 0
        self.faults: Counter[str] = Counter()
        self.hang_s = 30.0
        self._lock = threading.Lock()
        self._upstream = urlsplit(upstream).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator[FaultyStore]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def reset(self, plan: Plan | None = None) -> None:
        """Count from zero, with another plan."""
        with self._lock:
            self.plan, self.num_requests = plan, 0
            self.faults.clear()

    def decide(self, method: str, path: str) -> str | None:
        with self._lock:
            self.num_requests += 1
            kind = self.plan(method, path) if self.plan else None
            if kind == "short" and method != "GET":
                kind = "reset"
            if kind:
                self.faults[kind] += 1
            return kind

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes):
        """The true answer: status, headers, body."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.request(method, path, body=body or None, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


def _handler_of(store: FaultyStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = store.decide(self.command, self.path)
            if kind in ERRORS:
                self._error(*ERRORS[kind])
            elif kind == "reset":
                self._reset()
            elif kind == "hang":
                time.sleep(store.hang_s)
                self._reset()
            else:
                if kind == "slow":
                    time.sleep(0.5)
                self._true_answer(body, kind)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _any

        def _true_answer(self, body: bytes, kind: str | None) -> None:
            status, headers, data = store.forward(self.command, self.path, dict(self.headers), body)
            length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
            if kind == "changed" and status < 300:
                data = bytes(byte ^ 0xFF for byte in data)
                headers = [(n, '"0123456789abcdef"' if n.lower() == "etag" else v) for n, v in headers]
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if kind == "short" and data else data)
            if kind == "short":
                self.wfile.flush()
                self._reset()

        def _error(self, status: int, code: str) -> None:
            data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made to fail</Message></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _reset(self) -> None:
            """RST instead of an answer's end."""
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def log_message(self, *_) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):  # the connection is gone, by us or by the client
                self.close_connection = True

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    return Handler

"""A model hub on this machine: one folder at one commit, as huggingface_hub asks for it; counts what is sent."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "5" * 40
_WAIT_S = 120.0  # then a body is sent all the same, and the test's counts say what was wrong


class Hub:
    """Counts requests by (method, file), and holds back each weight file until so many clients have asked for it."""

    def __init__(self, folder: Path, repo: str, *, num_clients: int) -> None:
        self.folder, self.repo, self._num_clients = folder, repo, num_clients
        self.requests: Counter[tuple[str, str]] = Counter()
        self._changed = threading.Condition()

    def count(self, method: str, name: str) -> None:
        with self._changed:
            self.requests[method, name] += 1
            self._changed.notify_all()

    def wait_for_all(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.requests["HEAD", name] >= self._num_clients, _WAIT_S)


@contextmanager
def model_hub(folder: Path, repo: str, *, num_clients: int) -> Iterator[tuple[str, Hub]]:
    """Serve a model folder; its address for HF_ENDPOINT, and the counts."""
    hub = Hub(folder, repo, num_clients=num_clients)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer("HEAD")

        def do_GET(self) -> None:
            self._answer("GET")

        def log_message(self, *_: Any) -> None:
            """Stay silent."""

        def _answer(self, method: str) -> None:
            if self.path.startswith(f"/api/models/{repo}/tree/"):
                files = [path for path in sorted(folder.iterdir()) if path.is_file()]
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                self._send(200, json.dumps(tree).encode())
                return
            if self.path.startswith(f"/api/models/{repo}"):
                names = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": names}).encode())
                return
            name = self.path.partition("?")[0].rpartition("/")[2]
            hub.count(method, name)
            path = folder / name
            if "/resolve/" not in self.path or not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            if method == "GET" and name.endswith(".safetensors"):
                hub.wait_for_all(name)
            body = path.read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            self._send(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

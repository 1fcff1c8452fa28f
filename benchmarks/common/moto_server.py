"""Runs moto's S3 server in a process of its own, for benchmarks and tests that read and write over HTTP."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_START_S = 60


@contextmanager
def moto_server(log: Path) -> Iterator[str]:
    """Yield the address of a server of our own, ended by its pid.

    Args:
        log: the file that takes what the server says; its port, which it chose, is read there.

    Raises:
        RuntimeError: it did not start.
    """
    command = [os.path.join(os.path.dirname(sys.executable), "moto_server"), "-H", "127.0.0.1", "-p", "0"]
    with open(log, "wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + _START_S
        while not (found := re.search(r"Running on (http://\S+)\s", log.read_text())):
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"moto_server did not start; pip install -e '.[dev]'. It said: {log.read_text()}")
            time.sleep(0.1)
        yield found[1]
    finally:
        server.kill()
        server.wait()

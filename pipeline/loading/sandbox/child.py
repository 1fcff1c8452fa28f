"""Runs one decoder child (`sandbox.server`): its pipes, limits and CPU seconds, and what its end means.

The child is spawned, not forked. Its environment holds no credentials and no proxies.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ItemError, PipelineError
from pipeline.loading.sandbox.server import LENGTH
from pipeline.records import RowErrorType
from pipeline.storage.uris import printable

_START_S = 120.0
_MAX_HEADER_BYTES = 1 << 24
_OUT_OF_MEMORY = ("bad_alloc", "MemoryError", "Cannot allocate memory", "out of memory")
_ALL_ITS_THREADS = 2  # CPUCLOCK_SCHED of include/linux/posix-timers.h, where a process's clock is `~pid << 3 | kind`


class DecordFailedError(Exception):
    """decord refused the file or ended its process; PyAV in a new child may still read it."""

    def __init__(self, error_type: RowErrorType, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.error = ItemError(error_type, message, retryable=retryable)


class TimedOutError(Exception):
    """The deadline passed."""


class ChildExitedError(Exception):
    """The child closed its end of the pipe."""


class SandboxProcess:
    """Holds a running child process and its pipes."""

    def __init__(self, setup: bytes, memory_bytes: int) -> None:
        self.num_items = 0
        self._last_cpu_s = 0.0
        self._memory_bytes = memory_bytes
        self._stderr = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (`kill` closes the file; it has no name)
        # The kernel kills the child when the last copy of `alive_write` is closed, that is, when this process ends.
        alive_read, self._alive_write = os.pipe()
        command = [sys.executable, "-P", "-m", "pipeline.loading.sandbox.server", str(alive_read), str(memory_bytes)]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=_environment(),
                pass_fds=(alive_read,),
                bufsize=0,
            )
        finally:
            os.close(alive_read)
        assert self.process.stdin
        assert self.process.stdout
        self._stdin, self._stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        try:
            self.send(setup, time.monotonic() + _START_S)
            self.receive_header(time.monotonic() + _START_S)
        except (TimedOutError, ChildExitedError) as error:
            what = "no answer" if isinstance(error, TimedOutError) else self.stderr_tail
            self.kill()
            raise PipelineError(f"the decoder process could not start: {what}; try: {' '.join(command[:4])}") from error

    def send(self, message: bytes, deadline_s: float) -> None:
        rest = memoryview(LENGTH.pack(len(message)) + message)
        while rest:
            _wait(self._stdin, select.POLLOUT, deadline_s)
            try:
                rest = rest[os.write(self._stdin, rest) :]
            except BrokenPipeError as error:
                raise ChildExitedError from error

    def receive_header(self, deadline_s: float) -> dict[str, Any]:
        (num_bytes,) = LENGTH.unpack(self.receive(LENGTH.size, deadline_s).tobytes())
        if num_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {num_bytes} bytes")
        return json.loads(self.receive(num_bytes, deadline_s).tobytes())

    def receive(self, num_bytes: int, deadline_s: float) -> np.ndarray:
        """Receive uint8 [num_bytes], read directly into the array that is returned."""
        if num_bytes > self._memory_bytes:
            raise ValueError(f"{num_bytes} bytes announced, more than the process may have")
        data = np.empty(num_bytes, np.uint8)
        rest = memoryview(data.data)
        while rest:
            _wait(self._stdout, select.POLLIN, deadline_s)
            received = os.readv(self._stdout, [rest])
            if not received:
                raise ChildExitedError
            rest = rest[received:]
        return data

    def explain_end(self, *, used_decord: bool) -> Exception:
        """Return the error for a child that ended by itself."""
        code = self._reap()
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        stderr_tail = self.stderr_tail
        if any(sign in stderr_tail for sign in _OUT_OF_MEMORY):
            return ItemError("load_out_of_memory", f"its process needed more than {self._memory_bytes:,} bytes")
        if name == "SIGXCPU":
            return ItemError("load_timeout", "its process used more CPU time than load_timeout_s")
        message = f"the decoder process died of {name} {printable(stderr_tail.rpartition(chr(10))[2])}".rstrip()
        if name == "SIGKILL":  # sent from outside: by a person, or by the kernel when the machine is out of memory
            return ItemError("load_crashed", message, retryable=True)
        return DecordFailedError("load_crashed", message) if used_decord else ItemError("load_crashed", message)

    @property
    def stderr_tail(self) -> str:
        """The end of what the child wrote to stderr since its last answer."""
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), 2000, max(0, size - 2000)).decode(errors="replace").strip()

    @property
    def cpu_s(self) -> float:
        return _process_cpu_s(self.process.pid) if self.process.returncode is None else self._last_cpu_s

    def _reap(self) -> int:
        """Wait for the child's end, and read its CPU seconds before the kernel drops them."""
        if self.process.returncode is None:
            with suppress(ChildProcessError):  # another part of this process has reaped the child
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            self._last_cpu_s = _process_cpu_s(self.process.pid)
        return self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self._reap()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        self._stderr.close()
        os.close(self._alive_write)


def _wait(descriptor: int, event: int, deadline_s: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    left_ms = (deadline_s - time.monotonic()) * 1000
    if left_ms <= 0 or not poll.poll(left_ms):
        raise TimedOutError


def _process_cpu_s(pid: int) -> float:
    """Return user and system seconds so far, to the microsecond, ended threads included; 0.0 without such a process.

    A process that ended and was not reaped still has its seconds.
    """
    try:
        return time.clock_gettime(~pid << 3 | _ALL_ITS_THREADS)
    except OSError:
        return 0.0


def _environment() -> dict[str, str]:
    """Return only the paths of the parent's modules and libraries: no credentials, no proxies."""
    root = str(Path(__file__).resolve().parents[3])
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    modules = os.pathsep.join([root, *filter(None, sys.path)])
    return kept | threads | {"PYTHONPATH": modules, "PATH": os.defpath, "LC_ALL": "C.UTF-8"}  # decord reads PATH

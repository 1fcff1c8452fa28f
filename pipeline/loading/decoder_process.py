"""The parent's side of the disposable child process (`decoder_child`): start, ask, wait, kill, explain.

The child is spawned, not forked, with an environment of its own: no credentials, no proxies. It may crash, hang or run
out of memory; it is killed at the deadline, and the error says what happened. Knows no decoder, no storage, no rows.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ROW_ERROR_TYPES, ItemError, PipelineError, RowErrorType
from pipeline.loading.decoder_child import LENGTH
from pipeline.loading.process_cpu import process_cpu_s
from pipeline.storage.uris import printable

if TYPE_CHECKING:
    from illava.preprocess import Preprocessor, VisualInput
    from pipeline.config import MediaConfig
    from pipeline.loading.media import DecoderChoice
    from pipeline.records import MediaKind

MEMORY_BYTES = 4 << 30
ITEMS_PER_CHILD = 200
_START_S = 120.0
_MAX_HEADER_BYTES = 1 << 24
_OUT_OF_MEMORY = ("bad_alloc", "MemoryError", "Cannot allocate memory", "out of memory")


class DecordFailedError(Exception):
    """decord refused the file or ended its process; PyAV in a fresh child may still read it."""

    def __init__(self, error_type: RowErrorType, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.error = ItemError(error_type, message, retryable=retryable)


@dataclass(frozen=True, slots=True)
class DecodedMedia:
    """What came back from the child; durations and CPU seconds are the child's own."""

    media: tuple[VisualInput, ...]
    timestamps_s: tuple[float, ...]
    decoder: str
    partial: str | None
    preprocess_s: float
    cpu_s: float


class DecoderProcess:
    """One child, started when it is needed and replaced when it is used up. For one thread at a time."""

    def __init__(
        self,
        media: MediaConfig,
        preprocessor: Preprocessor,
        *,
        memory_bytes: int = MEMORY_BYTES,
        items_per_child: int = ITEMS_PER_CHILD,
    ) -> None:
        self._setup = pickle.dumps((media, preprocessor))
        self._memory_bytes = memory_bytes
        self._items_per_child = items_per_child
        self._child: _Child | None = None
        self._past_cpu_s = 0.0

    @property
    def pid(self) -> int | None:
        """Of the running child."""
        return self._child.process.pid if self._child else None

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all children so far, in the kernel's ticks of 10 ms."""
        return self._past_cpu_s + (self._child.cpu_s if self._child else 0.0)

    def load(self, kind: MediaKind, paths: Sequence[str], *, decoder: DecoderChoice, deadline_s: float) -> DecodedMedia:
        """Decode and preprocess one item.

        Args:
            kind: what the files are.
            paths: local files.
            decoder: which decoder the child may use.
            deadline_s: on `time.monotonic`; the child is killed then.

        Raises:
            ItemError: named by the child, or ``load_timeout``, ``load_crashed``, ``load_out_of_memory``.
            DecordFailedError: decord was in use and refused the file or ended the child.
            PipelineError: the child cannot be started at all.
        """
        child = self._child = self._child or _Child(self._setup, self._memory_bytes)
        child.num_items += 1
        keep = False
        try:
            child.send(json.dumps({"kind": kind, "paths": list(paths), "decoder": decoder}).encode(), deadline_s)
            answer = child.receive_header(deadline_s)
            decoded = _decoded(answer, child, deadline_s)
            keep = child.num_items < self._items_per_child
            return decoded
        except _TimedOutError:
            raise ItemError("load_timeout", "not loaded within load_timeout_s; its process was killed") from None
        except _EndedError:
            raise child.explain_end(used_decord=decoder != "pyav" and kind == "video") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ItemError("load_crashed", f"the decoder process answered nonsense: {error}") from error
        except ItemError as error:
            keep = error.error_type != "load_out_of_memory" and child.num_items < self._items_per_child
            raise
        finally:
            if not keep:
                self.close()

    def close(self) -> None:
        """End the child at once. Another `load` starts a new one."""
        child, self._child = self._child, None
        if child:
            child.kill()
            self._past_cpu_s += child.cpu_s


class _TimedOutError(Exception):
    """The deadline passed."""


class _EndedError(Exception):
    """The other end of the pipe is gone."""


class _Child:
    """A running child process and its pipes."""

    def __init__(self, setup: bytes, memory_bytes: int) -> None:
        self.num_items = 0
        self._last_cpu_s = 0.0
        self._memory_bytes = memory_bytes
        self._stderr = tempfile.TemporaryFile("a+b")  # noqa: SIM115 (closed by `kill`; it has no name that could be left)
        # The child is killed by the kernel when the last copy of `alive_write` is closed: when this process ends.
        alive_read, self._alive_write = os.pipe()
        command = [sys.executable, "-P", "-m", "pipeline.loading.decoder_child", str(alive_read), str(memory_bytes)]
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
        except (_TimedOutError, _EndedError) as error:
            what = "no answer" if isinstance(error, _TimedOutError) else self.last_words
            self.kill()
            raise PipelineError(f"the decoder process could not start: {what}; try: {' '.join(command[:4])}") from error

    def send(self, message: bytes, deadline_s: float) -> None:
        rest = memoryview(LENGTH.pack(len(message)) + message)
        while rest:
            _wait(self._stdin, select.POLLOUT, deadline_s)
            try:
                rest = rest[os.write(self._stdin, rest) :]
            except BrokenPipeError as error:
                raise _EndedError from error

    def receive_header(self, deadline_s: float) -> dict[str, Any]:
        (num_bytes,) = LENGTH.unpack(self.receive(LENGTH.size, deadline_s).tobytes())
        if num_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {num_bytes} bytes")
        return json.loads(self.receive(num_bytes, deadline_s).tobytes())

    def receive(self, num_bytes: int, deadline_s: float) -> np.ndarray:
        """uint8 [num_bytes]; read straight into the array that is kept."""
        if num_bytes > self._memory_bytes:
            raise ValueError(f"{num_bytes} bytes announced, more than the process may have")
        data = np.empty(num_bytes, np.uint8)
        rest = memoryview(data.data)
        while rest:
            _wait(self._stdout, select.POLLIN, deadline_s)
            received = os.readv(self._stdout, [rest])
            if not received:
                raise _EndedError
            rest = rest[received:]
        return data

    def explain_end(self, *, used_decord: bool) -> Exception:
        """The error for a child that ended by itself."""
        code = self._reap()
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        last_words = self.last_words
        if any(sign in last_words for sign in _OUT_OF_MEMORY):
            return ItemError("load_out_of_memory", f"its process needed more than {self._memory_bytes:,} bytes")
        if name == "SIGXCPU":
            return ItemError("load_timeout", "its process used more CPU time than load_timeout_s")
        message = f"the decoder process died of {name} {printable(last_words.rpartition(chr(10))[2])}".rstrip()
        if name == "SIGKILL":  # from outside: a person, or the kernel when the machine is out of memory
            return ItemError("load_crashed", message, retryable=True)
        return DecordFailedError("load_crashed", message) if used_decord else ItemError("load_crashed", message)

    @property
    def last_words(self) -> str:
        """The end of what the child wrote to stderr since its last answer."""
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), 2000, max(0, size - 2000)).decode(errors="replace").strip()

    @property
    def cpu_s(self) -> float:
        return process_cpu_s(self.process.pid) if self.process.returncode is None else self._last_cpu_s

    def _reap(self) -> int:
        """Wait for the end; its CPU seconds are read before the kernel forgets them."""
        if self.process.returncode is None:
            with suppress(ChildProcessError):  # another part of this process waited for it already
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            self._last_cpu_s = process_cpu_s(self.process.pid)
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
        raise _TimedOutError


def _environment() -> dict[str, str]:
    """Nothing of the parent's but where its modules and libraries are: no credentials, no proxies."""
    root = str(Path(__file__).resolve().parents[2])
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    modules = os.pathsep.join([root, *filter(None, sys.path)])
    return kept | threads | {"PYTHONPATH": modules, "PATH": os.defpath, "LC_ALL": "C.UTF-8"}  # decord reads PATH


def _decoded(answer: dict[str, Any], child: _Child, deadline_s: float) -> DecodedMedia:
    from illava.preprocess import VisualInput

    if "refused" in answer:
        raise DecordFailedError("corrupt_media", f"decord cannot read this file: {answer['refused']}")
    if "error_type" in answer:
        if answer["error_type"] not in ROW_ERROR_TYPES:
            raise ValueError(answer["error_type"])
        raise ItemError(answer["error_type"], answer["message"])
    media, times_s = [], tuple(answer["timestamps_s"])
    for medium in answer["media"]:
        shape = tuple(int(size) for size in medium["shape"])
        tiles = child.receive(int(np.prod(shape)), deadline_s).reshape(shape)
        height, width = medium["original_size"]
        own_times_s = times_s if medium["kind"] == "video" and len(times_s) == shape[0] else ()
        media.append(VisualInput(medium["kind"], tiles, (height, width), own_times_s))
    keys = ("decoder", "partial", "preprocess_s", "cpu_s")
    return DecodedMedia(tuple(media), times_s, *(answer[key] for key in keys))

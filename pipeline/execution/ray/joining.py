"""Bounds what joining a Ray cluster takes: a port without a listener is told at once, a silent one in 30 seconds.

Ray's own attempts last for minutes in C++, where no signal is seen. They are made on a thread beside the main one,
which stays open to signals. This module never imports Ray.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import sys
import threading
from collections.abc import Callable

from pipeline.errors import ClusterError

REACH_S = 30.0
_LOOK_S = 0.2
_HOST_AND_PORT = re.compile(r"(?:ray://)?(\[[0-9a-fA-F:]+\]|[^:/\s]+):(\d{1,5})")


def check_listens(*, timeout_s: float = REACH_S) -> None:
    """Refuse a RAY_ADDRESS where nobody listens, before Ray is imported.

    An address without host and port, such as ``auto``, is let through, and a session of this process is used as it is.

    Raises:
        ClusterError: the name is not known, or the connection was refused or not answered.
    """
    found = _HOST_AND_PORT.fullmatch(os.environ.get("RAY_ADDRESS", ""))
    if found is None or "ray" in sys.modules:
        return
    try:
        with socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=timeout_s):
            return
    except OSError as error:
        raise ClusterError(unreachable(found[0], error)) from error


def unreachable(address: str, reason: object) -> str:
    """Say that there is no cluster at RAY_ADDRESS, and what to do."""
    return (
        f"cannot reach the Ray cluster at {address} (RAY_ADDRESS): {reason}; `ray status` says whether it stands, "
        "`unset RAY_ADDRESS` starts one here, and --set runtime.executor=local runs without Ray"
    )


class Joining:
    """Makes a call on a thread of its own that lives as long as this object: processes that it starts end with it."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    def call(self, function: Callable[[], object], *, timeout_s: float) -> None:
        """Call the function, and wait for its end; signals are seen meanwhile.

        Raises:
            ClusterError: it did not end in time. Its thread cannot be ended; the process ends nevertheless.
            Exception: the function's own.
        """
        done, errors = threading.Event(), list[BaseException]()

        def run() -> None:
            try:
                function()
            except BaseException as error:
                errors.append(error)
            done.set()
            if not errors:
                self._ended.wait()

        thread = threading.Thread(target=run, name="join-ray", daemon=True)
        thread.start()
        waited_s = 0.0
        try:
            while not done.wait(_LOOK_S):
                waited_s += _LOOK_S
                if waited_s >= timeout_s:
                    raise ClusterError(f"no answer within {timeout_s:g} s")
        except BaseException as error:
            _leave_without(done, error)
            raise
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Let the thread end."""
        self._ended.set()


def _leave_without(done: threading.Event, error: BaseException) -> None:
    """At the end of the process, do not wait for a call that nothing can end."""
    code = getattr(error, "exit_code", 130)

    def leave() -> None:
        if not done.is_set():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    atexit.register(leave)

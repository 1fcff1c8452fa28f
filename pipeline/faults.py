"""Names the places where a test or a benchmark may make a run fail.

Nothing here can be switched on by a configuration, a flag or the environment: only by code that calls `injected`, in
the same process. Switched off, a fault point costs one comparison.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

FaultPoint = Literal[
    "read",  # before a request for one object: what it raises becomes an `ItemError`
    "write",  # before a request for the store as a whole (list, write, create, delete): becomes a `StorageError`
    "lease",  # before an item is taken for loading
    "load",  # before an item is loaded, in its reader
    "batch",  # before the running batch is advanced, in its worker
    "publish_before",  # a shard is complete, its part not yet written
    "publish_after",  # the part stands, nobody knows yet
]
FAULT_POINTS: tuple[str, ...] = get_args(FaultPoint)
Hook = Callable[[FaultPoint, str], None]

_hook: Hook | None = None
_thread = threading.local()


def fault_point(name: FaultPoint, subject: str = "") -> None:
    """Raise what the installed hook raises; do nothing where none is.

    Args:
        name: of the place.
        subject: what is at stake there: an address, an item's id, a shard's number.
    """
    if _hook is not None and not getattr(_thread, "spared", False):
        _hook(name, subject)


@contextmanager
def spared() -> Iterator[None]:
    """While entered, leave this thread's fault points out: what it does is beside the work, and in no order with it."""
    before, _thread.spared = getattr(_thread, "spared", False), True
    try:
        yield
    finally:
        _thread.spared = before


@contextmanager
def injected(hook: Hook) -> Iterator[None]:
    """While entered, make every fault point of this process call ``hook``, from whatever thread."""
    global _hook  # noqa: PLW0603 - one per process is the point
    if _hook is not None:
        raise RuntimeError("fault points have a hook already")
    _hook = hook
    try:
        yield
    finally:
        _hook = None

"""Who wants to see attention while a model answers: towers and decoders tell a listener every layer's scores.

Shape suffixes: T tokens in packed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Watcher = Callable[[str, int, Tensor], None]
_WATCHER: ContextVar[Watcher | None] = ContextVar("attention_watcher", default=None)


def watcher() -> Watcher | None:
    """Who wants to see attention in this context: called with stage, layer and a score [T] of every (visual) token."""
    return _WATCHER.get()


@contextmanager
def watched_by(listener: Watcher) -> Iterator[None]:
    """While entered, towers and decoders tell ``listener`` every layer's attention."""
    token = _WATCHER.set(listener)
    try:
        yield
    finally:
        _WATCHER.reset(token)

"""Turns SIGINT and SIGTERM into a flag that the event loop reads, so that a run ends between two polls.

Before the loop there is nothing to end in order: the first signal raises then, so that no phase is deaf to it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from pipeline.exit_codes import Terminated

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Remembers the first signal once `loop_began` was called; until then, and for a second one, a signal raises."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._in_loop = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def loop_began(self) -> None:
        """From now on the caller reads `signal` between two polls."""
        self._in_loop = True

    def reinstall(self) -> None:
        """Install the handlers again: Ray replaces them when it starts."""
        if self._before:
            for number in _SIGNALS:
                signal.signal(number, self._remember)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, by convention; 0 without a signal."""
        return 128 + self.signal.value if self.signal else 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None or not self._in_loop:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.signal = signal.Signals(number)

"""Seconds as the device counts them: CUDA events on a GPU, the host's clock on a CPU; and statistics of rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class DeviceClock:
    """Call it for a stamp in seconds. On a GPU a stamp waits for all work before it: put stamps between stages only."""

    def __init__(self, device: torch.device) -> None:
        self.kind = "events" if device.type == "cuda" else "host"
        self._elapsed_s = 0.0
        self._last = self._event() if self.kind == "events" else None

    def __call__(self) -> float:
        if self._last is None:
            return time.perf_counter()
        event = self._event()
        event.synchronize()
        self._elapsed_s += self._last.elapsed_time(event) / 1000
        self._last = event
        return self._elapsed_s

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds_each(clock: DeviceClock, work: Callable[[], object], *, repeats: int, rounds: int) -> dict[str, float]:
    """Median seconds of one call, over rounds of so many calls without a stamp in between; the first round warms up."""
    taken = []
    for _ in range(rounds + 1):
        start = clock()
        for _ in range(repeats):
            work()
        taken.append((clock() - start) / repeats)
    return summary(taken[1:])


def summary(values: list[float]) -> dict[str, Any]:
    """Median, spread and number of rounds."""
    low, high = min(values), max(values)
    return {"median": statistics.median(values), "min": low, "max": high, "rounds": len(values)}

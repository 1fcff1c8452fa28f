"""Measures the peak memory of some work: allocated memory on a GPU, resident memory of this process on a CPU.

The two figures do not compare with each other. On a CPU the peak is Linux's high-water mark of the whole process,
weights included; other threads, and freed memory that was not returned, raise it.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


class PeakMemory:
    """Measures the peak of the work in its ``with`` block.

    Attributes:
        num_bytes: the peak, from the end of the block on; None where this machine does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.num_bytes: int | None = None
        self._known = True

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:  # not Linux, or a sandbox that forbids it
            self._known = False
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._device.type == "cuda":
            self.num_bytes = torch.cuda.max_memory_allocated(self._device)
        elif self._known:
            lines = _STATUS.read_text().splitlines()
            self.num_bytes = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)

"""A model that holds back its later answers until a test says so; importable in Ray's workers."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.execution.worker import VLMWorker
from tests.support.runs.fakes import FakeVLM


class GatedVLM(FakeVLM):
    """From an item's number on, nothing is answered before a file exists.

    Args:
        gates: first number -> that file.
        sleeps: as of a `FakeVLM`.
    """

    def __init__(self, gates: dict[int, str], *, sleeps: dict[str, float] | None = None) -> None:
        super().__init__(sleeps=sleeps)
        self._gates = gates

    def step(self) -> list:
        number = int(self._queue[0][0].request_id.rpartition("-")[2])
        for first, file in self._gates.items():
            while number >= first and not Path(file).exists():
                time.sleep(0.01)
        return super().step()


def gated_worker(config, run_info, *, gates: dict[int, str], pid_folder: str | None = None, **options) -> VLMWorker:
    """A worker around a `GatedVLM`; leaves its process id as a file name where asked to."""
    if pid_folder is not None:
        Path(pid_folder, f"vlm-{os.getpid()}").touch()
    return VLMWorker(config, run_info, vlm=GatedVLM(gates, **options))

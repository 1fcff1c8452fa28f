"""Models that hang, never finish, run out of memory or lose their device. Importable in Ray's workers.

Each answers like `fakes.FakeVLM` otherwise: the barcode of the frames.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.execution.worker import VLMWorker
from tests.support.media.clips import read_barcode
from tests.support.models.gated_model import GatedVLM
from tests.support.runs import fakes


def answer_of(request) -> int:
    """What the model will say: the barcode in the request's frames."""
    return read_barcode(next(part.tiles[0] for part in request.content if not isinstance(part, str)))


class HangingVLM(fakes.FakeVLM):
    """A forward that never returns for one answer; also so that no Python code of its process runs any more."""

    def __init__(self, *, hang: int, hold_gil: bool = False) -> None:
        super().__init__()
        self._hang, self._hold_gil = hang, hold_gil

    def step(self):
        if answer_of(self._queue[0][0]) == self._hang:
            if self._hold_gil:
                ctypes.PyDLL(None).sleep(10_000)
            while True:
                time.sleep(1)
        return super().step()


class EndlessVLM(fakes.FakeVLM):
    """Steps return, but one answer never comes to its end."""

    def __init__(self, *, endless: int) -> None:
        super().__init__()
        self._endless = endless

    def step(self):
        if answer_of(self._queue[0][0]) == self._endless:
            self._queue.rotate(-1)
            time.sleep(0.001)
            return []
        return super().step()


class SmallDeviceVLM(fakes.FakeVLM):
    """All requests inside are in memory together; more than `fits` bytes of frames are too many.

    Attributes:
        num_failed: steps that ran out of memory.
        most_inside: requests that ever fitted together.
    """

    def __init__(self, *, fits: int, sleeps=None, message: str = "CUDA out of memory. Tried to allocate 2 GiB") -> None:
        super().__init__(sleeps=sleeps)
        self._fits, self._message = fits, message
        self.num_failed = self.most_inside = 0

    def step(self):
        if sum(_nbytes(request) for request, _ in self._queue) > self._fits:
            self.num_failed += 1
            raise torch.OutOfMemoryError(self._message)
        self.most_inside = max(self.most_inside, len(self._queue))
        return super().step()


class LostDeviceVLM(fakes.FakeVLM):
    """After one answer was asked for, every call of this process raises, as CUDA does once a kernel has failed.

    Args:
        trigger: that answer.
        flag: a file; where given, only the first process that gets there loses its device.
    """

    def __init__(self, *, trigger: int, flag: str | None = None) -> None:
        super().__init__()
        self._trigger, self._flag, self._is_lost = trigger, flag and Path(flag), False

    def step(self):
        if answer_of(self._queue[0][0]) == self._trigger and not (self._flag and self._flag.exists()):
            self._is_lost = True
            if self._flag:
                self._flag.touch()
        if self._is_lost:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().step()


_MODELS = (fakes.FakeVLM, GatedVLM, HangingVLM, EndlessVLM, SmallDeviceVLM, LostDeviceVLM)
MODELS = {model.__name__: model for model in _MODELS}


def worker(config, run_info, *, model: str, pid_folder: str | None = None, **options) -> VLMWorker:
    """A worker around one of `MODELS`; leaves its process id as a file name where asked to."""
    if pid_folder is not None:
        Path(pid_folder, f"vlm-{os.getpid()}").touch()
    return VLMWorker(config, run_info, vlm=MODELS[model](**options))


def _nbytes(request) -> int:
    return sum(np.asarray(part.tiles).nbytes for part in request.content if not isinstance(part, str))


def worker_without_device(config, run_info) -> VLMWorker:
    """A worker whose every step raises."""

    class NoDevice(fakes.FakeVLM):
        def step(self):
            raise RuntimeError("CUDA error: device-side assert triggered")

    return VLMWorker(config, run_info, vlm=NoDevice())

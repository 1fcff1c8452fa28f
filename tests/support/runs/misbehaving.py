"""Provides preprocessors that do harm inside the decoder's child process, and a plain one. Importable there by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from illava.preprocess import VisualInput


@dataclass(frozen=True)
class Untouched:
    """Frames as they are decoded."""

    def video(self, frames: Sequence[np.ndarray]) -> VisualInput:
        return VisualInput("video", np.stack(frames), frames[0].shape[:2])

    def images(self, frames: Sequence[np.ndarray]) -> tuple[VisualInput, ...]:
        return tuple(VisualInput("image", frame[None], frame.shape[:2]) for frame in frames)


@dataclass(frozen=True)
class Thumbnails(Untouched):
    """Every n-th pixel of what is larger than 512 px, so that 8K frames need not cross whole."""

    def video(self, frames: Sequence[np.ndarray]) -> VisualInput:
        step = -(-max(frames[0].shape[:2]) // 512)
        return VisualInput("video", np.stack([frame[::step, ::step] for frame in frames]), frames[0].shape[:2])


@dataclass(frozen=True)
class SignalsItself(Untouched):
    """Ends its process by a signal on the ``at``-th item, like a decoder that crashes there."""

    signal_number: int = signal.SIGSEGV
    at: int = 1
    only_with: str = ""

    def video(self, frames: Sequence[np.ndarray]) -> VisualInput:
        if len(COUNT) + 1 == self.at and (not self.only_with or self.only_with in sys.modules):
            os.kill(os.getpid(), self.signal_number)
        COUNT.append(1)
        return super().video(frames)


COUNT: list[int] = []


@dataclass(frozen=True)
class SpinsThenDies(SignalsItself):
    """Ends its process after so much CPU."""

    cpu_s: float = 0.0

    def video(self, frames: Sequence[np.ndarray]) -> VisualInput:
        until_s = time.process_time() + self.cpu_s * (self.only_with in sys.modules)
        while time.process_time() < until_s:
            pass
        return super().video(frames)


@dataclass(frozen=True)
class ReadsAsFileObject(Untouched):
    """Gives decord a file object, which is how the mutants in data/ end it with a real SIGSEGV."""

    path: str = ""

    def video(self, frames: Sequence[np.ndarray]) -> VisualInput:
        import decord

        with open(self.path, "rb") as file:
            decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
        return super().video(frames)


@dataclass(frozen=True)
class Hangs(Untouched):
    def video(self, frames: Sequence[np.ndarray]) -> VisualInput:
        while True:
            time.sleep(1)


@dataclass(frozen=True)
class Spins(Untouched):
    def video(self, frames: Sequence[np.ndarray]) -> VisualInput:
        while True:
            pass


@dataclass(frozen=True)
class Chatters(Untouched):
    """Writes to stdout behind Python's back, as C libraries do."""

    def video(self, frames: Sequence[np.ndarray]) -> VisualInput:
        os.write(1, b"\xff" * 1000)
        return super().video(frames)


@dataclass(frozen=True)
class Rewrites(Untouched):
    """Changes the file while it is being loaded."""

    path: str = ""

    def video(self, frames: Sequence[np.ndarray]) -> VisualInput:
        os.utime(self.path, ns=(1, 1))
        return super().video(frames)


@dataclass(frozen=True)
class Hoards(Untouched):
    def video(self, frames: Sequence[np.ndarray]) -> VisualInput:
        np.ones(8 << 30, np.uint8)
        return super().video(frames)

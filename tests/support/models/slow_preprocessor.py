"""A preprocessor that sleeps first; importable by name in the decoder's child process, and light to import there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SlowPreprocessor:
    """``inner``, ``sleep_s`` later."""

    inner: Any
    sleep_s: float

    def video(self, frames):
        time.sleep(self.sleep_s)
        return self.inner.video(frames)

"""A model's surface whose caption is a digest of every pixel it was given; importable in Ray's workers."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np

from illava.requests import Generation, Timing, TokenUsage
from pipeline.execution.worker import VLMWorker


class DigestVLM:
    """Answers one request a step; two requests have one answer only where all their pixels are the same."""

    def __init__(self) -> None:
        self._queue: list[Any] = []
        self.device_busy_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a request waits."""
        return bool(self._queue)

    def submit(self, request: Any, *, plan: Any = None) -> None:
        """Take a request."""
        self._queue.append((request, time.perf_counter()))

    def cancel_all(self) -> list[str]:
        """Drop what waits."""
        dropped = [request.request_id for request, _ in self._queue]
        self._queue.clear()
        return dropped

    def step(self) -> list[Generation]:
        """Answer the oldest one."""
        request, since_s = self._queue.pop(0)
        begin_s = time.perf_counter()
        text = pixel_digest([part.tiles for part in request.content if not isinstance(part, str)])
        took_s = time.perf_counter() - begin_s
        self.device_busy_s += took_s
        timing = Timing(queue_s=begin_s - since_s, vision_s=took_s, prefill_s=0.0, decode_s=0.0, device_s=took_s)
        return [Generation(request.request_id, text, (1,), "stop", TokenUsage(49, 49, 49, 49, 49, 60, 1), timing)]


def pixel_digest(media: list[np.ndarray]) -> str:
    """Of shapes and pixels, in order."""
    digest = hashlib.sha256()
    for tiles in media:
        digest.update(repr(tiles.shape).encode() + np.ascontiguousarray(tiles).tobytes())
    return digest.hexdigest()


def digest_worker(config: Any, run_info: Any) -> VLMWorker:
    """A worker around a `DigestVLM`."""
    return VLMWorker(config, run_info, vlm=DigestVLM())

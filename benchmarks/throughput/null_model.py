"""Provides a model that answers at once or at a given rate, and a loader that reads nothing.

So a run measures the pipeline itself, or its readers. Ray's workers can import this file. Every other part of a run,
from the manifest to the published parts, is real.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from illava.preprocess import Preprocessor, VisualInput
from illava.requests import Generation, Request, Timing, TokenUsage
from pipeline.config.schema import JobConfig
from pipeline.execution.rows import RunInfo
from pipeline.execution.worker import VLMWorker
from pipeline.records import LoadedItem, LoadStats, MediaItem

_MODEL = Path(__file__).resolve().parents[2] / "configs" / "demo" / "model"
_USAGE = TokenUsage(784, 400, 196, 100, 70, 120, 8)
_TEXT = "a square moves to the left"


def null_job(folder: Path, num_items: int, *, executor: str = "ray", num_readers: int = 1) -> JobConfig:
    """Return a job of ``num_items`` items without media; write its manifest into the folder."""
    manifest = folder / f"items-{num_items}.jsonl"
    with open(manifest, "w") as lines:
        lines.writelines(json.dumps({"id": f"item-{n}", "uri": f"{n}.mp4"}) + "\n" for n in range(num_items))
    return JobConfig.model_validate(
        {
            "name": "null",
            "input": {"manifest": str(manifest)},
            "model": {"model_id": str(_MODEL), "device": "cpu", "max_batch_requests": 32},
            "runtime": {"executor": executor, "gpus_per_actor": 0, "num_reader_actors": num_readers},
            "output": {"uri": str(folder / f"out-{num_items}")},
        }
    )


class NullVLM:
    """Has the methods of `illava.VLM` that a worker uses; a step answers all submitted requests."""

    def __init__(self) -> None:
        self._asked: list[tuple[Request, float]] = []
        self.device_busy_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._asked)

    def submit(self, request: Request, *, plan: Any = None) -> None:
        self._asked.append((request, time.perf_counter()))

    def cancel_all(self) -> list[str]:
        dropped = [request.request_id for request, _ in self._asked]
        self._asked.clear()
        return dropped

    def step(self) -> list[Generation]:
        now_s = time.perf_counter()
        asked, self._asked = self._asked, []
        waited = ((request, Timing(now_s - since_s, 0.0, 0.0, 0.0, 0.0)) for request, since_s in asked)
        return [Generation(one.request_id, _TEXT, (1, 2, 3), "stop", _USAGE, timing) for one, timing in waited]


class PacedVLM(NullVLM):
    """Answers one request after another at a rate, as a GPU would: it sleeps, and takes no processor.

    Args:
        items_per_h: the rate.
    """

    def __init__(self, items_per_h: float) -> None:
        super().__init__()
        self._item_s = 3600 / items_per_h

    def step(self) -> list[Generation]:
        later = self._asked[1:]
        del self._asked[1:]
        time.sleep(self._item_s * len(self._asked))
        self.device_busy_s += self._item_s * len(self._asked)
        answered = super().step()
        self._asked += later
        return answered


class NullLoader:
    """Gives two grey frames for each item, without a file."""

    def load(self, item: MediaItem) -> LoadedItem:
        frames = np.full((2, 56, 56, 3), 127, np.uint8)
        return LoadedItem(item, (VisualInput("video", frames, (56, 56)),), (0.0, 0.5), LoadStats(decoder="null"))

    def close(self) -> None:
        pass


def null_worker(config: JobConfig, run_info: RunInfo) -> VLMWorker:
    return VLMWorker(config, run_info, vlm=NullVLM())


def paced_worker(config: JobConfig, run_info: RunInfo, *, items_per_h: float) -> VLMWorker:
    return VLMWorker(config, run_info, vlm=PacedVLM(items_per_h))


def null_loader(config: JobConfig, preprocessor: Preprocessor) -> NullLoader:
    return NullLoader()

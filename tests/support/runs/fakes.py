"""Provides fakes of a model and a loader, importable in Ray's workers: they read barcodes, sleep, or die on request.

Small jobs that use them are here too.

`FakeVLM` has the methods of `illava.VLM` that a worker uses. A request is in one state at a time, and every sleep
counts for the state in which it happens.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import deque
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from illava.preprocess import VisualInput
from illava.requests import Generation, Timing, TokenUsage
from pipeline.config.schema import JobConfig
from pipeline.errors import ItemError
from pipeline.execution.worker import VLMWorker
from pipeline.inspection.verify import verify_run
from pipeline.records import LoadedItem, LoadStats, MediaItem
from tests.support.media.clips import read_barcode

DEMO_MODEL = Path(__file__).resolve().parents[3] / "configs" / "demo" / "model"
FREE_COLUMNS = {"attempts", "bytes_fetched", "cost_usd", "finished_at"}


def job_config(out: Path | str, source: dict, *, executor: str = "local", num_vlms: int = 1, **sections) -> JobConfig:
    """A small job over `source` (the ``input`` section); further sections override key by key."""
    data = {
        "name": "test",
        "input": source,
        "media": {"num_frames": 2},
        "model": {"model_id": str(DEMO_MODEL), "device": "cpu", "max_batch_requests": 8},
        "runtime": {
            "executor": executor,
            "gpus_per_actor": 0,
            "num_vlm_actors": {"min": 1, "max": num_vlms},
            "num_reader_actors": 2,
        },
        "output": {"uri": str(out), "items_per_shard": 8},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return JobConfig.model_validate(data)


def numbered_items(folder: Path, num_items: int, *, per_medium: int = 1) -> dict:
    """The ``input`` of that many items for `FakeLoader`: media carry their answers, none of them exist."""
    manifest = folder / "items.jsonl"
    lines = (json.dumps({"id": f"item-{n}", "uri": f"{n // per_medium}.mp4"}) for n in range(num_items))
    manifest.write_text("\n".join(lines))
    return {"manifest": str(manifest)}


def read_rows(output: Path | str) -> list[dict]:
    """All rows of a local run, part by part."""
    parts = sorted(Path(output, "data").glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def violations(output: Path | str) -> list[str]:
    """What `verify` finds, but for seconds of which a busy machine held the process between two stamps.

    That stages sum to the latency is held by tests of their own, with `tests.support.timing`.
    """
    return [str(found) for found in verify_run(str(output)) if found.kind != "stage_seconds"]


def fixed(row: dict) -> dict:
    """A row without what may differ between two runs of one job."""
    return {name: value for name, value in row.items() if not name.endswith("_s") and name not in FREE_COLUMNS}


class FakeVLM:
    """Answers one request a step with the barcode its frames carry.

    Args:
        sleeps: seconds slept in a state, by its Timing field.
        poison: an answer that ends the process by SIGKILL, as often as it is tried.
        broken: an answer that ends as an error of that request alone.
    """

    def __init__(self, *, sleeps: dict[str, float] | None = None, poison: str = "", broken: str = "") -> None:
        self._sleeps, self._poison, self._broken = sleeps or {}, poison, broken
        self._queue: deque = deque()
        self.device_busy_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._queue)

    def submit(self, request, *, plan=None) -> None:
        self._queue.append((request, time.perf_counter()))

    def cancel_all(self) -> list[str]:
        dropped = [request.request_id for request, _ in self._queue]
        self._queue.clear()
        return dropped

    def step(self) -> list[Generation]:
        request, since_s = self._queue.popleft()
        stamps = {}
        for state in ("queue_s", "vision_s", "prefill_s", "decode_s"):
            time.sleep(self._sleeps.get(state, 0.0))
            if state == "vision_s":
                frames = np.concatenate([mm_item.tiles for mm_item in request.media])
                answers = {read_barcode(frame) for frame in frames}
            now_s = time.perf_counter()
            stamps[state], since_s = now_s - since_s, now_s
        text = ",".join(str(answer) for answer in sorted(answers))
        if text == self._poison:
            os.kill(os.getpid(), signal.SIGKILL)
        busy_s = stamps["vision_s"] + stamps["prefill_s"] + stamps["decode_s"]
        self.device_busy_s += busy_s
        timing = Timing(**stamps, device_s=busy_s)
        usage = TokenUsage(
            len(frames) * 196, len(frames) * 100, len(frames) * 49, len(frames) * 25, len(frames) * 17, 200, 5
        )
        if text == self._broken:
            error = ValueError("a defect of this request alone")
            return [Generation(request.request_id, "", (), None, None, timing, error=error)]
        return [Generation(request.request_id, text, (1, 2, 3), "stop", usage, timing)]


def barcode_worker(config, run_info, *, pid_folder: str | None = None, **options) -> VLMWorker:
    """A worker around a `FakeVLM`; leaves its process id as a file name where asked to."""
    _leave_pid(pid_folder, "vlm")
    return VLMWorker(config, run_info, vlm=FakeVLM(**options))


def raising_factory(config, _, *, error: type[Exception], message: str):
    """Stands for a worker or a loader that cannot be made."""
    raise error(message)


def dying_worker(config, run_info):
    """A worker whose process ends while it loads."""
    os.kill(os.getpid(), signal.SIGKILL)


class FakeLoader:
    """Makes frames from the medium's name (``<value>.mp4``): no file is read.

    Args:
        side: of the frames in px.
        sleeps: seconds slept in a stage, by its LoadStats field.
        poison: an item id whose load ends the process by SIGKILL.
        failing: item id -> error type.
        retryable: the same, for errors that may pass.
        passing: items whose first load fails as a store does that has a bad moment; of each loader.
    """

    def __init__(self, *, side=56, sleeps=None, poison="", failing=None, retryable=False, passing=()) -> None:
        self._side, self._sleeps, self._poison = side, sleeps or {}, poison
        self._failing, self._retryable, self._passing = failing or {}, retryable, set(passing)

    def load(self, item: MediaItem) -> LoadedItem:
        from tests.support.media.clips import barcode_frame

        if item.item_id == self._poison:
            os.kill(os.getpid(), signal.SIGKILL)
        if item.item_id in self._failing:
            raise ItemError(self._failing[item.item_id], "made to fail", retryable=self._retryable)
        if item.item_id in self._passing:
            self._passing.remove(item.item_id)
            raise ItemError("store_error", "503 Slow Down", retryable=True)
        stamps, since_s = {}, time.perf_counter()
        for stage in ("fetch_s", "load_s", "preprocess_s"):
            time.sleep(self._sleeps.get(stage, 0.0))
            if stage == "load_s":
                frame = barcode_frame(int(Path(item.uris[0]).stem), 0, width=self._side, height=self._side)
            now_s = time.perf_counter()
            stamps[stage], since_s = now_s - since_s, now_s
        medium = VisualInput("video", np.stack([frame, frame]), frame.shape[:2])
        return LoadedItem(item, (medium,), (0.0, 0.1), LoadStats(**stamps, cpu_s=0.001, decoder="fake"))

    def close(self) -> None:
        pass


def fake_loader(config, preprocessor, *, pid_folder: str | None = None, **options) -> FakeLoader:
    """A `FakeLoader`; leaves its process id as a file name where asked to."""
    _leave_pid(pid_folder, "reader")
    return FakeLoader(**options)


def _leave_pid(folder: str | None, kind: str) -> None:
    if folder is not None:
        Path(folder, f"{kind}-{os.getpid()}").touch()

"""Runs a small captioning job on Ray that reports, in a folder, how far it is and which processes it has.

Readers, decoder children, scheduler, storage and sink are the pipeline's own; the model reads the number that is drawn
into each clip. `ray_kill_runs` kills its processes. The folder holds ``media/``, ``events`` (one line per started load
or given answer), ``pids/KIND-PID`` and ``out/`` (the run).
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))
from pipeline.config.schema import JobConfig
from pipeline.execution.runner import build_loader, run_job
from pipeline.execution.worker import VLMWorker
from tests.support.media.clips import write_barcode_video
from tests.support.runs import fakes

NUM_ITEMS, ITEMS_PER_SHARD, MAX_OPEN_SHARDS, MAX_BATCH = 48, 6, 2, 4
ANSWER_S = 0.02


def prepare(folder: Path, media: Path) -> None:
    """Make a job's folder over clips that many jobs share; make missing clips."""
    media.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_ITEMS):
        if not (path := media / f"{number}.mp4").exists():
            write_barcode_video(path, number, num_frames=3)
    (folder / "pids").mkdir(parents=True)
    (folder / "events").touch()
    lines = "\n".join(f'{{"id": "item-{n}", "uri": "{n}.mp4"}}' for n in range(NUM_ITEMS))
    (folder / "items.jsonl").write_text(lines)


def job(folder: Path, media: Path) -> JobConfig:
    """Return the configuration."""
    return fakes.job_config(
        folder / "out",
        {"manifest": str(folder / "items.jsonl"), "uri": str(media)},
        executor="ray",
        model={"max_batch_requests": MAX_BATCH},
        runtime={"max_open_shards": MAX_OPEN_SHARDS, "num_reader_actors": 1},
        output={"items_per_shard": ITEMS_PER_SHARD},
    )


def drive(folder: str, media: str) -> int:
    """Run the driver; return its exit code."""
    config, place = job(Path(folder), Path(media)), Path(folder)
    factories: Any = {"worker_factory": partial(_worker, place=place), "loader_factory": partial(_loader, place=place)}
    return run_job(config, **factories).exit_code


class _WatchedVLM(fakes.FakeVLM):
    def __init__(self, place: Path) -> None:
        super().__init__(sleeps={"decode_s": ANSWER_S})
        self._place = place

    def step(self) -> list:
        ended = super().step()
        _tell(self._place, "answer", ended[0].request_id)
        return ended


class _WatchedLoader:
    def __init__(self, loader: Any, place: Path) -> None:
        self._loader, self._place, self.close = loader, place, loader.close

    def load(self, item: Any) -> Any:
        _tell(self._place, "load", item.item_id)
        return self._loader.load(item)


def _worker(config: JobConfig, run_info: Any, *, place: Path) -> VLMWorker:
    (place / "pids" / f"vlm-{os.getpid()}").touch()
    return VLMWorker(config, run_info, vlm=_WatchedVLM(place))


def _loader(config: JobConfig, preprocessor: Any, *, place: Path) -> _WatchedLoader:
    (place / "pids" / f"reader-{os.getpid()}").touch()
    return _WatchedLoader(build_loader(config, preprocessor), place)


def _tell(place: Path, what: str, item_id: str) -> None:
    with open(place / "events", "a") as events:  # short appends of several processes do not mix
        events.write(f"{what} {item_id}\n")


if __name__ == "__main__":
    import watched_job  # by its own name, so that Ray's workers find its classes

    sys.exit(watched_job.drive(*sys.argv[1:]))

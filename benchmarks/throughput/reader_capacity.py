"""Measures what one item costs a reader, and so how many cores of readers keep a GPU of a given speed busy.

python benchmarks/throughput/reader_capacity.py --json benchmarks/results/reader_capacity_cpu.json

Clips of 1280x720 px at 30 fps in h264, a key frame every 2 s, sound beside them; 8 frames are taken and brought to
384 px. They are read as local files and from S3 over HTTP (moto, in a process of its own), there as whole objects and
by ranges. An item's CPU seconds are those of the reader's process with all its threads, and of its decoder child: they
hardly depend on what else the machine does. Cores for a GPU are its items a second times these seconds.

Two jobs on Ray with one reader and a model that only sleeps then show the same from outside: with a model as fast as
the GPU the job waits for the readers; with one slower than a reader it waits for the model.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from benchmarks.common.machine import write_json  # noqa: E402
from benchmarks.common.moto_server import moto_server  # noqa: E402
from benchmarks.common.paired_rounds import by_turns  # noqa: E402
from benchmarks.throughput.null_model import paced_worker  # noqa: E402
from illava.families import load_preprocessor  # noqa: E402
from illava.preprocess import Preprocessor  # noqa: E402
from pipeline.config.schema import JobConfig, MediaConfig  # noqa: E402
from pipeline.execution.ray.actors import connect  # noqa: E402
from pipeline.execution.reporting import progress  # noqa: E402
from pipeline.execution.runner import run_job  # noqa: E402
from pipeline.loading.loader import Loader  # noqa: E402
from pipeline.records import MediaItem  # noqa: E402
from pipeline.storage import storage  # noqa: E402

GPU_ITEMS_PER_H = 34_000  # short captions that one H200 is predicted to give; benchmarks/README.md
DURATIONS_S = (10, 60, 300)
NUM_FRAMES, FPS, CYCLE_S, SIZE_PX, MODEL_PX = 8, 30, 10, (1280, 720), 384
SIDES: dict[str, tuple[str, dict[str, str]]] = {  # where the clip lies, and how it is read
    "local, decord": ("local", {}),
    "local, PyAV": ("local", {"decoder": "pyav"}),
    "S3, whole objects": ("s3", {"ranged_reads": "off"}),
    "S3, ranged": ("s3", {}),
}
_BUCKET, _REGION = "capacity", "eu-west-1"  # moto refuses a CreateBucket that names us-east-1


def street(num_frames: int) -> Iterator[np.ndarray]:
    """Yield frames with about as much detail, motion and grain as a street that a phone pans over: 2 to 4 Mbit/s."""
    rng, (width, height) = np.random.default_rng(0), SIZE_PX
    rows, cols = np.fft.fftfreq(height + 80)[:, None], np.fft.fftfreq(width + 240)[None]
    falling = 1 / np.maximum(np.hypot(rows, cols), 1 / height) ** 1.1  # as the detail of photographs falls
    waves = np.fft.fft2(rng.standard_normal((height + 80, width + 240, 3)), axes=(0, 1)) * falling[..., None]
    wall = np.fft.ifft2(waves, axes=(0, 1)).real
    wall = np.clip(128 + 45 * wall / wall.std(), 0, 255).astype(np.uint8)
    grain = rng.normal(0, 1.5, (8, height, width, 1)).astype(np.int8)
    walkers = rng.integers(0, 255, (5, 30, 15, 3), dtype=np.uint8).repeat(6, 1).repeat(6, 2)
    for number in range(num_frames):
        turn = 2 * np.pi * number / num_frames
        top, left = int(40 + 40 * np.sin(2 * turn)), int(120 + 120 * np.sin(turn))
        frame = wall[top : top + height, left : left + width].copy()
        for walker, picture in enumerate(walkers):
            x = int((0.5 + 0.5 * np.sin((1 + walker % 3) * turn + walker)) * (width - 90))
            frame[100 + 90 * walker : 280 + 90 * walker, x : x + 90] = picture
        yield np.clip(frame.astype(np.int16) + grain[number % 8], 0, 255).astype(np.uint8)


@contextmanager
def served_s3(log: Path) -> Iterator[Any]:
    """Run moto's server in a process of its own; yield a client of its one bucket."""
    import boto3

    with moto_server(log) as url:
        os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}
        os.environ |= {"AWS_DEFAULT_REGION": _REGION, "AWS_EC2_METADATA_DISABLED": "true"}
        client = boto3.client("s3")
        client.create_bucket(Bucket=_BUCKET, CreateBucketConfiguration={"LocationConstraint": _REGION})
        yield client


class Side:
    """Reads one clip again and again, each time as an object that the reader does not know yet."""

    def __init__(
        self, path: Path, where: str, options: dict[str, str], preprocessor: Preprocessor, client: Any
    ) -> None:
        self._path, self._client, self._count = path, client if where == "s3" else None, 0
        self._loader = Loader(MediaConfig(num_frames=NUM_FRAMES, **options), preprocessor)  # type: ignore[arg-type]
        self._loader.warm_up()

    def read(self) -> dict[str, float]:
        """Return what one item took."""
        item = self._next_item()
        began = time.perf_counter(), time.process_time(), time.thread_time()
        loaded = self._loader.load(item)
        wall_s, cpu_s, thread_s = (
            clock() - start
            for clock, start in zip((time.perf_counter, time.process_time, time.thread_time), began, strict=True)
        )
        if loaded.partial or len(loaded.media[0].tiles) != NUM_FRAMES:
            raise SystemExit(f"{item.uris[0]}: {loaded.partial or 'fewer frames than asked for'}")
        stats = loaded.stats
        return {
            "cpu_s": cpu_s + stats.cpu_s - thread_s,  # its own threads, and the child's part of what it reports
            "wall_s": wall_s,
            "bytes_fetched": stats.bytes_fetched,
            "storage_requests": stats.storage_requests,
        }

    def close(self) -> None:
        self._loader.close()

    def _next_item(self) -> MediaItem:
        uri, self._count = str(self._path), self._count + 1
        if self._client is not None:
            key = f"{id(self)}-{self._count}.mp4"
            self._client.upload_file(uri, _BUCKET, key)
            uri = f"s3://{_BUCKET}/{key}"
        info = storage.stat(uri)
        return MediaItem(f"{self._count}", (info.uri,), "video", (info.size,), (info.etag,))


def measure(path: Path, rounds: int, preprocessor: Preprocessor, client: Any) -> dict[str, dict[str, Any]]:
    """Read one clip by every side, by turns; return each side's medians, with the extremes of its CPU seconds."""
    sides = {name: Side(path, where, options, preprocessor, client) for name, (where, options) in SIDES.items()}
    try:
        for side in sides.values():
            side.read()  # the first loads a decoder
        seen = by_turns({name: side.read for name, side in sides.items()}, rounds)
    finally:
        for side in sides.values():
            side.close()
    result = {}
    for name, items in seen.items():
        medians = {key: median(item[key] for item in items) for key in items[0]}
        cpu = [item["cpu_s"] for item in items]
        cores = GPU_ITEMS_PER_H / 3600 * medians["cpu_s"]
        result[name] = {**medians, "cpu_s_range": [min(cpu), max(cpu)], "cores_per_gpu": cores}
    return result


def job(clip: Path, folder: Path, *, num_items: int, items_per_h: float, output: str) -> dict[str, Any]:
    """Run a job of one reader and a model of this rate; return what its progress line said it waits for."""
    media = folder / "media"
    media.mkdir(exist_ok=True)
    for number in range(num_items):
        if not (copy := media / f"{number}.mp4").exists():
            copy.hardlink_to(clip)
    config = JobConfig.model_validate(
        {
            "name": "capacity",
            "input": {"uri": str(media), "pattern": "*.mp4"},
            "media": {"num_frames": NUM_FRAMES},
            "model": {"model_id": str(folder / "model"), "device": "cpu", "max_batch_requests": 8},
            "runtime": {"executor": "ray", "gpus_per_actor": 0, "num_reader_actors": 1},
            "output": {"uri": str(folder / output), "items_per_shard": 8},
        }
    )
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    progress.logger.addHandler(handler)
    progress.logger.setLevel(logging.INFO)
    progress.LINE_EVERY_S = 4.0
    with connect(config.runtime):
        summary = run_job(config, worker_factory=partial(paced_worker, items_per_h=items_per_h))
    progress.logger.removeHandler(handler)
    if summary.exit_code:
        raise SystemExit(f"the job ended with {summary.exit_code}")
    waits = [found[0] for line in said if (found := re.search(r"waits for [^,]+", line))]
    if not waits:
        raise SystemExit("the job ended before its first progress line: give more --items")
    table = pq.read_table(folder / output / "data", columns=["finished_at"])
    ended = sorted(map(datetime.fromisoformat, table["finished_at"].to_pylist()))
    rate = (num_items - 1) / (ended[-1] - ended[0]).total_seconds()
    return {"model_items_per_h": items_per_h, "num_readers": 1, "items_per_h": 3600 * rate, "waits": waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, nargs="+", default=DURATIONS_S, help="lengths of the clips")
    parser.add_argument("--items", type=int, default=24, help="of each job; 0 leaves the jobs out")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)  # Ray's workers import this project's benchmarks
    from tests.support.media.clips import write_video
    from tests.support.media.long_videos import repeat_video
    from tests.support.models.onevision import make_onevision

    results, jobs = [], []
    with TemporaryDirectory() as name, served_s3(Path(name, "moto.log")) as client:
        folder = Path(name)
        preprocessor = load_preprocessor(str(make_onevision(folder / "model", side=MODEL_PX, patch=14)))
        options = {"crf": "25", "preset": "veryfast", "threads": "1", "bf": "2", "x264-params": "scenecut=0"}
        frames = street(CYCLE_S * FPS)
        cycle = write_video(folder / "cycle.mp4", frames, fps=FPS, keyframe_interval=2 * FPS, options=options)
        for duration_s in args.seconds:
            path = folder / f"{duration_s}.mp4"
            repeat_video(cycle, path, cycle_s=CYCLE_S, fps=FPS, duration_s=duration_s, faststart=True)
            setting = {"duration_s": duration_s, "size_px": SIZE_PX, "fps": FPS, "num_frames": NUM_FRAMES}
            sides = measure(path, args.rounds, preprocessor, client)
            results.append({"setting": setting, "num_bytes": path.stat().st_size, "sides": sides})
            show(results[-1])
            keep(args, results, jobs)
        if args.items:
            clip = folder / f"{args.seconds[0]}.mp4"
            alone_per_h = 3600 / results[0]["sides"]["local, decord"]["wall_s"]
            for rate, output in ((GPU_ITEMS_PER_H, "fast"), (alone_per_h / 2, "slow")):
                jobs.append(job(clip, folder, num_items=args.items, items_per_h=rate, output=output))
                print(jobs[-1], flush=True)
                keep(args, results, jobs)


def keep(args: argparse.Namespace, results: list[dict[str, Any]], jobs: list[dict[str, Any]]) -> None:
    """Write what has been measured so far."""
    shown = {"gpu_items_per_h": GPU_ITEMS_PER_H, "model_px": MODEL_PX, "rounds": args.rounds}
    write_json(args.json, {"benchmark": "reader_capacity", **shown, "results": results, "jobs": jobs})


def show(result: dict[str, Any]) -> None:
    """Print one clip's sides, one a line."""
    print(f"{result['setting']['duration_s']} s, {result['num_bytes'] / 1e6:.1f} MB")
    for name, side in result["sides"].items():
        low, high = side["cpu_s_range"]
        print(
            f"  {name:<18} {side['cpu_s']:.3f} CPU s (from {low:.3f} to {high:.3f}), {side['wall_s']:.3f} s, "
            f"{side['bytes_fetched'] / 1e6:.2f} MB in {side['storage_requests']:.0f} requests: "
            f"{side['cores_per_gpu']:.1f} cores a GPU",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""What a reader costs: isolation against decoding in this process, decord against PyAV, ranged against whole reads.

python benchmarks/reader_throughput.py --json benchmarks/results/reader_throughput_cpu.json

The sides take turns; ratios are of medians of CPU seconds, the child's included, which other work on the machine
hardly moves. Decoding and preprocessing
are the same code in both processes. Ranged reads go over local files: what they save is bytes, on a network also time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from illava.preprocess import load_preprocessor  # noqa: E402
from pipeline import storage  # noqa: E402
from pipeline.config import MediaConfig  # noqa: E402
from pipeline.loading.decoder_process import DecoderProcess  # noqa: E402
from pipeline.loading.media import load_video  # noqa: E402
from pipeline.loading.mp4_index import fetch_index  # noqa: E402
from pipeline.loading.ranged_video import load_present, needed_ranges  # noqa: E402
from pipeline.loading.sparse_copy import SparseCopy  # noqa: E402


def bare_decord(path: str, num_frames: int) -> None:
    """decord as a script would use it: no checks, no child."""
    import decord
    import numpy as np

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    reader.get_batch(np.linspace(0, len(reader) - 1, num_frames, dtype=int)).asnumpy()


def by_ranges(path: str, media: MediaConfig, folder: Path) -> float:
    """Share of the file's bytes that were read."""
    info, target = storage.stat(path), folder / "sparse"
    target.unlink(missing_ok=True)
    copy = SparseCopy(str(target), info.uri, info.size, info.etag)

    def read(start: int, end: int) -> bytes:
        copy.fetch(copy.missing([(start, end)]))
        return copy.read(start, end)

    fetch_index(read, info.size)
    copy.fetch(copy.missing(needed_ranges(copy.path, media)))
    load_present(copy.path, media, copy.present)
    return copy.num_bytes / copy.size


def take_turns(sides: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median CPU seconds of each side, after one round that is not counted."""
    times_s: dict[str, list[float]] = {name: [] for name in sides}
    for count in range(rounds + 1):
        for name, side in sides.items():
            began_s = clock()
            side()
            if count:
                times_s[name].append(clock() - began_s)
    return {name: statistics.median(values) for name, values in times_s.items()}


def measure(path: str, num_frames: int, rounds: int, preprocessor: Any, folder: Path) -> dict[str, Any]:
    """One file's seconds and ratios."""
    media = MediaConfig(num_frames=num_frames)
    child = DecoderProcess(media, preprocessor)

    def here(decoder: str) -> None:
        preprocessor.video(load_video(path, media, decoder=decoder).frames)

    def isolated(decoder: str) -> None:
        child.load("video", [path], decoder=decoder, deadline_s=time.monotonic() + 600)

    sides = {
        "bare_decord_s": lambda: bare_decord(path, num_frames),
        "decord_here_s": lambda: here("auto"),
        "decord_isolated_s": lambda: isolated("auto"),
        "pyav_here_s": lambda: here("pyav"),
        "pyav_isolated_s": lambda: isolated("pyav"),
        "ranged_here_s": lambda: by_ranges(path, media, folder),
    }
    try:
        median_s = take_turns(sides, rounds, lambda: time.process_time() + child.cpu_s)
    finally:
        child.close()
    ratios = {
        "isolation_decord": median_s["decord_isolated_s"] / median_s["decord_here_s"],
        "isolation_pyav": median_s["pyav_isolated_s"] / median_s["pyav_here_s"],
        "checks_and_preprocessing": median_s["decord_here_s"] / median_s["bare_decord_s"],
        "ranged_bytes_ratio": by_ranges(path, media, folder),
    }
    return {"median": median_s, "ratios": ratios}


def main() -> None:
    """Measure a two-minute and a twenty-minute file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--files", type=int, default=3, help="1: two minutes; 3: twenty minutes too")
    parser.add_argument("--side-px", type=int, default=320)
    args = parser.parse_args()
    from long_videos import write_long_video
    from models import make_onevision

    from benchmarks.machine import write_json

    results = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        preprocessor = load_preprocessor(str(make_onevision(folder / "model")))
        for duration_s, num_frames in ((120, 8), (120, 32), (1200, 8))[: args.files]:
            path = folder / f"{duration_s}.mp4"
            if not path.exists():
                write_long_video(path, folder, duration_s=duration_s, side=args.side_px)
            setting = {"duration_s": duration_s, "num_frames": num_frames, "side_px": args.side_px, "fps": 15}
            measured = measure(str(path), num_frames, args.rounds, preprocessor, folder)
            results.append({"setting": setting, "num_bytes": path.stat().st_size, **measured})
            print(setting, {name: round(value, 3) for name, value in measured["ratios"].items()}, flush=True)
    write_json(args.json, {"benchmark": "reader_throughput", "rounds": args.rounds, "results": results})


if __name__ == "__main__":
    main()

"""Measures a reader: sandboxed against in-process decoding, decord against PyAV, ranged against whole reads.

python benchmarks/throughput/reader_throughput.py --json benchmarks/results/reader_throughput_cpu.json

The sides alternate, one after another in each round. A ratio compares two sides of the same round; its median over the
rounds is given with the least and the largest. Wall time needs an idle machine; CPU seconds, the child's included,
hardly do. All sides end with the same frames at model size, so that they differ only in where and how the work is done.
Ranged reads go over local files: they save bytes, and on a network also time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from illava.families import load_preprocessor  # noqa: E402
from pipeline.config.schema import MediaConfig  # noqa: E402
from pipeline.loading.decoding.media import load_video  # noqa: E402
from pipeline.loading.decoding.ranged_video import load_present, needed_ranges  # noqa: E402
from pipeline.loading.sandbox.client import DecoderProcess  # noqa: E402
from pipeline.loading.sparse_file import SparseCopy  # noqa: E402
from pipeline.loading.video_index.mp4_index import fetch_index  # noqa: E402
from pipeline.storage import storage  # noqa: E402

FILES = (  # seconds, px, frames
    (120, 160, 8),
    (120, 320, 8),
    (60, 640, 8),
)
RATIOS = {
    "isolation": ("decord_isolated", "decord_here"),
    "isolated_against_decord_alone": ("decord_isolated", "decord_alone"),
    "isolation_pyav": ("pyav_isolated", "pyav_here"),
    "ranged_against_whole": ("ranged_here", "pyav_here"),
}


def decord_alone(path: str, num_frames: int) -> Any:
    """Decode with decord as a script would: no checks, no child."""
    import decord
    import numpy as np

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    return list(reader.get_batch(np.linspace(0, len(reader) - 1, num_frames, dtype=int)).asnumpy())


def by_ranges(path: str, media: MediaConfig, folder: Path) -> tuple[Any, float]:
    """Return the frames, and the share of the file's bytes that were read."""
    info, target = storage.stat(path), folder / "sparse"
    target.unlink(missing_ok=True)
    copy = SparseCopy(str(target), info.uri, info.size, info.etag)

    def read(start: int, end: int) -> bytes:
        copy.fetch(copy.missing([(start, end)]))
        return copy.read(start, end)

    fetch_index(read, info.size)
    copy.fetch(copy.missing(needed_ranges(copy.path, media)))
    return load_present(copy.path, media, copy.present).frames, copy.num_bytes / copy.size


def take_turns(
    sides: dict[str, Callable[[], Any]], rounds: int, clocks: dict[str, Callable[[], float]]
) -> dict[str, dict[str, list[float]]]:
    """Return clock -> side -> seconds of each round, after one round that is not counted."""
    spent: dict[str, dict[str, list[float]]] = {clock: {side: [] for side in sides} for clock in clocks}
    for count in range(rounds + 1):
        for name, side in sides.items():
            began = {clock: read() for clock, read in clocks.items()}
            side()
            for clock, read in clocks.items():
                if count:
                    spent[clock][name].append(read() - began[clock])
    return spent


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the least and the largest value."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def measure(path: str, num_frames: int, rounds: int, preprocessor: Any, folder: Path) -> dict[str, Any]:
    """Measure one file's seconds and ratios."""
    media = MediaConfig(num_frames=num_frames)
    child = DecoderProcess(media, preprocessor)

    def here(decoder: str) -> None:
        preprocessor.video(load_video(path, media, decoder=decoder).frames)

    def isolated(decoder: str) -> None:
        child.load("video", [path], decoder=decoder, deadline_s=time.monotonic() + 600)

    sides = {
        "decord_alone": lambda: preprocessor.video(decord_alone(path, num_frames)),
        "decord_here": lambda: here("auto"),
        "decord_isolated": lambda: isolated("auto"),
        "pyav_here": lambda: here("pyav"),
        "pyav_isolated": lambda: isolated("pyav"),
        "ranged_here": lambda: preprocessor.video(by_ranges(path, media, folder)[0]),
    }
    clocks = {"wall_s": time.perf_counter, "cpu_s": lambda: time.process_time() + child.cpu_s}
    try:
        spent = take_turns(sides, rounds, clocks)
    finally:
        child.close()
    ratios = {
        clock: {
            name: spread([a / b for a, b in zip(of_sides[one], of_sides[other], strict=True)])
            for name, (one, other) in RATIOS.items()
        }
        for clock, of_sides in spent.items()
    }
    seconds = {clock: {side: spread(values) for side, values in found.items()} for clock, found in spent.items()}
    return {"seconds": seconds, "ratios": ratios, "ranged_bytes_ratio": by_ranges(path, media, folder)[1]}


def main() -> None:
    """Measure three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 for figures that are shown")
    parser.add_argument("--files", type=int, default=len(FILES), help="only the first so many")
    args = parser.parse_args()
    from benchmarks.common.machine import write_json
    from tests.support.media.long_videos import write_long_video
    from tests.support.models.onevision import make_onevision

    results = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        preprocessor = load_preprocessor(str(make_onevision(folder / "model")))
        for duration_s, side_px, num_frames in FILES[: args.files]:
            path = folder / f"{duration_s}-{side_px}.mp4"
            write_long_video(path, folder, duration_s=duration_s, side=side_px)
            setting = {"duration_s": duration_s, "num_frames": num_frames, "side_px": side_px, "fps": 15}
            measured = measure(str(path), num_frames, args.rounds, preprocessor, folder)
            results.append({"setting": setting, "num_bytes": path.stat().st_size, **measured})
            show(setting, measured)
    write_json(args.json, {"benchmark": "reader_throughput", "rounds": args.rounds, "results": results})


def show(setting: dict[str, Any], measured: dict[str, Any]) -> None:
    """Print one file's ratios, one per line."""
    print(setting, f"bytes read by ranges: {measured['ranged_bytes_ratio']:.1%} of the file")
    for clock, ratios in measured["ratios"].items():
        for name, ratio in ratios.items():
            said = f"{ratio['median']:.3f} (from {ratio['min']:.3f} to {ratio['max']:.3f})"
            print(f"  {clock:<7} {name:<30} {said}", flush=True)


if __name__ == "__main__":
    main()

"""Mutates media by seed and plays the mutants through whole runs: every item must have its row, and nothing but the
decoder's disposable child may die.

A seed fixes the original (mp4, fragmented mp4, mkv, webm, ts, avi, png, jpeg, webp, gif, tiff, pdf) and what is done to
its bytes. Loader, child, scheduler, sink and `verify` are the pipeline's own, in the local executor, so that a reader's
death would be this process's; the model is a stand-in that sums pixels.

    python benchmarks/fuzz_media.py --seeds 0:1000 [--json FILE]
    python benchmarks/fuzz_media.py --seeds 417 --keep FOLDER       # one mutant again, its file kept

The originals come from the encoders installed: with other versions of them, a seed is another mutant.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "benchmarks", "tests"))
import awkward_documents
import awkward_pictures
import fakes
import numpy as np
import video_writers
from machine import write_json

from illava.requests import Generation, Timing, TokenUsage
from pipeline.runner import run_job
from pipeline.verify import verify_run
from pipeline.worker import VLMWorker

LOAD_TIMEOUT_S = 20
_VIDEO_FRONT = {"options": video_writers.SLOW_264, "container_options": video_writers.FRONT}
_WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.mp4": video_writers.clip(**_VIDEO_FRONT),
    "b.mp4": video_writers.clip(container_options={"movflags": "frag_keyframe+empty_moov"}),
    "c.mp4": video_writers.clip(codec="mpeg4"),
    "a.mkv": video_writers.clip(codec="libx265", options=video_writers.CLOSED_HEVC),
    "a.webm": video_writers.clip(**video_writers.VP9),
    "b.webm": video_writers.clip(**video_writers.AV1),
    "a.ts": video_writers.clip(),
    "a.avi": video_writers.clip(codec="mpeg4"),
    "a.png": awkward_pictures.saved(),
    "a.jpg": awkward_pictures.oriented(6),
    "a.webp": awkward_pictures.animated,
    "a.gif": awkward_pictures.animated,
    "a.tiff": awkward_pictures.saved(compression="tiff_adobe_deflate"),
    "a.pdf": lambda path: path.write_bytes(awkward_documents.pdf(3)),
}
_VIDEOS = (".mp4", ".mkv", ".webm", ".ts", ".avi")
_EDGES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


@cache
def originals() -> dict[str, bytes]:
    """Name -> a whole file."""
    with tempfile.TemporaryDirectory() as folder:
        for name, write in _WRITERS.items():
            write(Path(folder, name))
        return {name: Path(folder, name).read_bytes() for name in _WRITERS}


def mutant(seed: int) -> tuple[str, bytes]:
    """The extension and the bytes of one seed's file."""
    draws = random.Random(f"mutant {seed}")
    name = draws.choice(sorted(_WRITERS))
    data = bytearray(originals()[name])
    for _ in range(draws.choice((1, 1, 2, 4, 16))):
        draws.choice(_MUTATIONS)(data, draws)
    return Path(name).suffix, bytes(data)


def _place(data: bytearray, draws: random.Random) -> int:
    """Anywhere, half the time in the first or last 2,000 bytes, where headers and indices lie."""
    near = min(len(data), 2000)
    return draws.choice(
        (draws.randrange(len(data) + 1), draws.randrange(near + 1), len(data) - draws.randrange(near + 1))
    )


def _flip_bits(data: bytearray, draws: random.Random) -> None:
    for _ in range(draws.choice((1, 8, 64))):
        if data:
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)


def _write_edge(data: bytearray, draws: random.Random) -> None:
    """A number at the edge of its range, of either byte order, over four or two bytes."""
    place, edge = _place(data, draws), draws.choice(_EDGES)
    word = struct.pack(draws.choice("<>") + "I", edge)[: draws.choice((2, 4))]
    data[place : place + len(word)] = word


def _write_noise(data: bytearray, draws: random.Random) -> None:
    place, noise = _place(data, draws), draws.randbytes(draws.choice((1, 16, 400, 4000)))
    data[place : place + len(noise)] = noise


def _insert_noise(data: bytearray, draws: random.Random) -> None:
    place = _place(data, draws)
    data[place:place] = draws.randbytes(draws.choice((1, 7, 188, 1000)))


def _delete(data: bytearray, draws: random.Random) -> None:
    place = _place(data, draws)
    del data[place : place + draws.choice((1, 4, 188, 2000))]


def _repeat(data: bytearray, draws: random.Random) -> None:
    place, length = _place(data, draws), draws.choice((4, 64, 1000))
    data[place:place] = data[place : place + length] * draws.choice((1, 1, 50))


def _blank(data: bytearray, draws: random.Random) -> None:
    place, length = _place(data, draws), draws.choice((4, 200, 5000))
    data[place : place + length] = bytes(len(data[place : place + length]))


def _cut(data: bytearray, draws: random.Random) -> None:
    del data[_place(data, draws) :]


def _splice(data: bytearray, draws: random.Random) -> None:
    """A part of another original in place of a part of this one."""
    other = originals()[draws.choice(sorted(_WRITERS))]
    start, place = draws.randrange(len(other)), _place(data, draws)
    data[place : place + 1000] = other[start : start + draws.choice((16, 1000, 5000))]


_MUTATIONS = (
    _flip_bits,
    _write_edge,
    _write_edge,
    _write_noise,
    _insert_noise,
    _delete,
    _repeat,
    _blank,
    _cut,
    _splice,
)


class PixelSum:
    """A model's surface that answers one request a step with what its pixels sum to."""

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

    def step(self) -> list[Generation]:
        """Answer the oldest one."""
        request, since_s = self._queue.pop(0)
        begin_s = time.perf_counter()
        tiles = [part.tiles for part in request.content if not isinstance(part, str)]
        text = f"{len(tiles)} media, sum {sum(int(np.sum(part, dtype=np.int64)) for part in tiles)}"
        took_s = time.perf_counter() - begin_s
        self.device_busy_s += took_s
        timing = Timing(queue_s=begin_s - since_s, vision_s=took_s, prefill_s=0.0, decode_s=0.0, device_s=took_s)
        return [Generation(request.request_id, text, (1,), "stop", TokenUsage(49, 49, 49, 49, 60, 1), timing)]


def pixel_worker(config: Any, run_info: Any) -> VLMWorker:
    """A worker around a `PixelSum`."""
    return VLMWorker(config, run_info, vlm=PixelSum())


@dataclass(slots=True)
class Outcome:
    """What became of some seeds.

    Attributes:
        results: status or error type -> number of items.
        violations: what must not happen, with the seed where one is known.
    """

    results: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


def play(seeds: Sequence[int], folder: Path) -> Outcome:
    """One whole run over the mutants of these seeds."""
    media = folder / "media"
    media.mkdir(parents=True)
    lines = []
    for seed in seeds:
        suffix, data = mutant(seed)
        (media / f"{seed}{suffix}").write_bytes(data)
        kind = "video" if suffix in _VIDEOS else "image"
        if suffix == ".pdf":
            kind = awkward_documents.PDF_KIND
        lines.append(json.dumps({"item_id": str(seed), "uri": f"media/{seed}{suffix}", "media_kind": kind}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    config = fakes.job_config(
        folder / "out", {"manifest": str(folder / "manifest.jsonl")}, media={"load_timeout_s": LOAD_TIMEOUT_S}
    )
    outcome = Outcome()
    try:
        run_job(config, worker_factory=pixel_worker)
    except Exception as error:
        outcome.violations.append(f"seeds {seeds[0]}..{seeds[-1]}: the run died of {type(error).__name__}: {error}")
        return outcome
    rows = {row["item_id"]: row for row in fakes.read_rows(folder / "out")}
    outcome.violations += [f"seed {seed}: no row" for seed in seeds if str(seed) not in rows]
    outcome.violations += [f"seeds {seeds[0]}..{seeds[-1]}: {found}" for found in verify_run(str(folder / "out"))]
    for seed, row in rows.items():
        outcome.results[row["error_type"] or row["status"]] += 1
        if row["error_type"] == "internal_error":
            outcome.violations.append(f"seed {seed}: {row['error_message']}")
    return outcome


def play_all(seeds: Sequence[int], folder: Path, *, seeds_per_run: int = 100) -> Outcome:
    """Runs of at most so many seeds each."""
    total = Outcome()
    for start in range(0, len(seeds), seeds_per_run):
        part = play(seeds[start : start + seeds_per_run], folder / str(start))
        total.results += part.results
        total.violations += part.violations
    return total


def main() -> int:
    """Play the seeds asked for; 1 where something must not have happened."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seeds", default="0:1000", metavar="FIRST:END", help="or one seed")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the mutants and runs there")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    first, _, end = options.seeds.partition(":")
    seeds = range(int(first), int(end or int(first) + 1))
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        outcome = play_all(seeds, options.keep or Path(temporary))
    seconds = time.perf_counter() - began_s
    for violation in outcome.violations:
        print(violation)
    print(f"{len(seeds)} mutants in {seconds:.0f} s, {len(outcome.violations)} violations: {dict(outcome.results)}")
    if options.json:
        result = {"benchmark": "fuzz_media", "num_mutants": len(seeds), "violations": outcome.violations}
        write_json(options.json, {**result, "results": dict(outcome.results), "seconds": seconds})
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())

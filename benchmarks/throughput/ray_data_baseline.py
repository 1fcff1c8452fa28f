"""Compares the same captioning job on this pipeline and on Ray Data, alternating on one cluster; then with a bad item.

python benchmarks/throughput/ray_data_baseline.py --json benchmarks/results/ray_data_baseline_cpu.json

Both sides use the same new clips, loader code, bundled model, plan, batch size, and number of readers and models. A
side's time is from the call to the last file, actors and model loading included, the cluster's own start excluded. Our
side writes whole rows with all guarantees on; Ray Data's side writes the texts. The texts are compared.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pyarrow.parquet as pq  # noqa: E402

from benchmarks.common.machine import write_json  # noqa: E402
from benchmarks.throughput.ray_data_job import run_on_ray_data  # noqa: E402
from benchmarks.toy_model.data.render_clips import render  # noqa: E402
from pipeline.config.load import load_config  # noqa: E402
from pipeline.config.schema import JobConfig, RuntimeConfig  # noqa: E402
from pipeline.execution.ray.actors import connect  # noqa: E402
from pipeline.execution.runner import run_job  # noqa: E402

NUM_BESIDE_BAD = 23
BAD_CLIP = b"\x00\x00\x00\x20ftypisom" + bytes(range(256)) * 40


def job(media: Path, output: Path) -> JobConfig:
    """Return the demo's configuration over the rendered clips."""
    overrides = [f"input.uri={media}", f"output.uri={output}", "output.items_per_shard=16"]
    return load_config(str(ROOT / "configs" / "demo.yaml"), overrides)


def ours(media: Path, output: Path) -> dict[str, str]:
    """Return texts by file name; the error type where an item has no text."""
    run_job(job(media, output))
    rows = pq.read_table(output / "data").to_pylist()
    return {Path(row["uri"]).name: row["error_type"] or row["text"] for row in rows}


def ray_data(media: Path, output: Path) -> dict[str, str]:
    """Return texts by file name, of all written rows."""
    run_on_ray_data(job(media, output), output)
    return _written(output)


def compare(media: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Measure items/s of both sides, alternating, and compare their texts."""
    sides: dict[str, Callable[[Path, Path], dict[str, str]]] = {"ours": ours, "ray_data": ray_data}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    steady: dict[str, list[float]] = {name: [] for name in sides}
    texts: dict[str, dict[str, str]] = {}
    for count in range(rounds):
        order = list(sides) if count % 2 == 0 else list(reversed(sides))
        for name in order:
            began_s = time.perf_counter()
            texts[name] = sides[name](media, output := folder / f"{name}-{count}")
            rates[name].append(len(texts[name]) / (time.perf_counter() - began_s))
            steady[name].append(steady_rate(output))
            print(f"round {count}, {name}: {rates[name][-1]:.2f}, steady {steady[name][-1]:.2f} items/s", flush=True)
    same = sum(texts["ours"][name] == text for name, text in texts["ray_data"].items())
    return {
        "items_per_s": rates,
        "steady_items_per_s": steady,
        "ours_vs_ray_data": statistics.median(rates["ours"]) / statistics.median(rates["ray_data"]),
        "ours_vs_ray_data_steady": statistics.median(steady["ours"]) / statistics.median(steady["ray_data"]),
        "same_texts": same,
        "num_items": len(texts["ours"]),
    }


def steady_rate(output: Path) -> float:
    """Return items/s from the first file to the last, without the start of actors and models."""
    folder = output / "data" if (output / "data").exists() else output
    parts = sorted(folder.glob("*.parquet"), key=_at_s)
    if len(parts) < 2:
        raise SystemExit(f"{output} has {len(parts)} files: too few for a rate, take more clips")
    num_items = sum(pq.read_metadata(part).num_rows for part in parts[1:])
    return num_items / (_at_s(parts[-1]) - _at_s(parts[0]))


def with_a_bad_item(clips: Path, folder: Path) -> dict[str, Any]:
    """Report the result of a run over some of the clips and one file that is no video."""
    import ray.data

    media = folder / "bad-media"
    media.mkdir()
    for clip in sorted(clips.glob("clip_*.mp4"))[:NUM_BESIDE_BAD]:
        (media / clip.name).hardlink_to(clip.resolve())
    (media / "clip_bad.mp4").write_bytes(BAD_CLIP)
    result: dict[str, Any] = {"num_items": len(list(media.glob("*.mp4")))}
    mine = ours(media, folder / "bad-ours")
    result["ours"] = {"ended": "exit code 3", "num_rows": len(mine), "bad_item": mine["clip_bad.mp4"]}
    for name, most_bad_blocks in (("ray_data", 0), ("ray_data_errors_allowed", -1)):
        ray.data.DataContext.get_current().max_errored_blocks = most_bad_blocks
        output, ended = folder / f"bad-{name}", "success"
        try:
            run_on_ray_data(job(media, output), output)
        except Exception as error:  # whatever a user of Ray Data would see
            ended = type(error).__name__
        written = _written(output)
        result[name] = {"ended": ended, "num_rows": len(written), "bad_item": written.get("clip_bad.mp4", "no row")}
        print(name, result[name], flush=True)
    return result


def _at_s(path: Path) -> float:
    return path.stat().st_mtime


def _written(output: Path) -> dict[str, str]:
    tables = [pq.read_table(path) for path in sorted(output.glob("*.parquet"))]
    return {Path(row["uri"]).name: row["text"] for table in tables for row in table.to_pylist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--media", type=Path, help="where the clips are kept or made; by default a temporary folder")
    parser.add_argument("--json", metavar="FILE", help="where to write the result")
    args = parser.parse_args()
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    import ray.data  # noqa: F401  # before the clock runs, and behind pipeline.execution.ray.actors, which says how Ray listens

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        media = args.media or folder / "media"
        if not list(media.glob("clip_*.mp4")):
            render(media, args.clips, first_seed=1000)
        # Enough for a reader, a model and Ray Data's own reading and writing tasks.
        runtime = RuntimeConfig(gpus_per_actor=0, num_reader_actors=3)
        with connect(runtime):
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            result = compare(media, folder, args.rounds)
            print({name: value for name, value in result.items() if name != "items_per_s"}, flush=True)
            result["bad_item"] = with_a_bad_item(media, folder)
    if args.json:
        write_json(args.json, {"benchmark": "ray_data_baseline", "rounds": args.rounds, **result})


if __name__ == "__main__":
    main()

"""Mutates media by seed and plays the mutants through whole runs.

Every item must have its row, and nothing but the decoder's disposable child may die.

A seed fixes the original (mp4, fragmented mp4, mkv, webm, ts, avi, png, jpeg, webp, gif, tiff, pdf) and how its bytes
are changed (`media_mutants`). Loader, child, scheduler, sink and `verify` are the pipeline's own; the model is a fake
whose caption is a digest of all pixels. On Ray, deaths are counted by what the driver reports, by the actors started
beyond those requested, and by sessions of the run that did not end. With the local executor a death would end this
process.

    python benchmarks/reliability/fuzz_media.py --seeds 0:1000 [--executor ray] [--json FILE]
    python benchmarks/reliability/fuzz_media.py --seeds 417 --keep FOLDER       # one mutant again, its file kept
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks.common.machine import write_json
from benchmarks.reliability.media_mutants import mutant
from pipeline.config.schema import JobConfig
from pipeline.execution.runner import build_loader, run_job
from pipeline.execution.worker import VLMWorker
from pipeline.inspection.verify import verify_run
from pipeline.loading.load_report import ItemLoader
from pipeline.runs.sessions import run_spending
from tests.support.media import adversarial_documents
from tests.support.models.digest_model import digest_worker
from tests.support.runs import fakes

LOAD_TIMEOUT_S = 20
NUM_READERS = 2
_VIDEOS = (".mp4", ".mkv", ".webm", ".ts", ".avi")
_ENDED = (0, 3)  # all items ok, or some failed


@dataclass(slots=True)
class Outcome:
    """Holds the result of some seeds.

    Attributes:
        results: status or error type -> number of items.
        violations: events that must not happen, with the seed where it is known.
        num_deaths: kind of process -> number that ended before their run did; filled only on Ray.
    """

    results: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    num_deaths: Counter[str] = field(default_factory=Counter)


def play(seeds: Sequence[int], folder: Path, executor: Literal["local", "ray"] = "local") -> Outcome:
    """Play one whole run over the mutants of these seeds."""
    _write_media(seeds, folder)
    outcome, these = Outcome(), f"seeds {seeds[0]}..{seeds[-1]}"
    try:
        _drive_on_ray(folder, outcome) if executor == "ray" else run_job(_job(folder), worker_factory=digest_worker)
    except Exception as error:
        outcome.violations.append(f"{these}: the run died of {type(error).__name__}: {error}")
        return outcome
    outcome.violations += [f"{these}: {found}" for found in verify_run(str(folder / "out"))]
    rows = {row["item_id"]: row for row in fakes.read_rows(folder / "out")}
    outcome.violations += [f"seed {seed}: no row" for seed in seeds if str(seed) not in rows]
    for seed, row in rows.items():
        outcome.results[row["error_type"] or row["status"]] += 1
        if row["error_type"] in {"internal_error", "worker_died"}:
            outcome.violations.append(f"seed {seed}: {row['error_message']}")
    outcome.violations += [f"{these}: {count} deaths of a {kind}" for kind, count in (+outcome.num_deaths).items()]
    return outcome


def play_all(seeds: Sequence[int], folder: Path, *, seeds_per_run: int = 100) -> Outcome:
    """Play local runs of at most ``seeds_per_run`` seeds each."""
    total = Outcome()
    for start in range(0, len(seeds), seeds_per_run):
        part = play(seeds[start : start + seeds_per_run], folder / str(start))
        total.results += part.results
        total.violations += part.violations
    return total


def _write_media(seeds: Sequence[int], folder: Path) -> None:
    media, lines = folder / "media", []
    media.mkdir(parents=True)
    for seed in seeds:
        suffix, data = mutant(seed)
        (media / f"{seed}{suffix}").write_bytes(data)
        kind = "video" if suffix in _VIDEOS else "image"
        if suffix == ".pdf":
            kind = adversarial_documents.PDF_KIND
        lines.append(json.dumps({"item_id": str(seed), "uri": f"media/{seed}{suffix}", "media_kind": kind}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))


def _job(folder: Path, executor: str = "local") -> JobConfig:
    return fakes.job_config(
        folder / "out",
        {"manifest": str(folder / "manifest.jsonl")},
        executor=executor,
        media={"load_timeout_s": LOAD_TIMEOUT_S},
        runtime={"num_reader_actors": NUM_READERS},
    )


# ---- on Ray


def drive(folder: str) -> int:
    """Run the driver; return its exit code."""
    place = Path(folder)
    factories: Any = {"worker_factory": partial(_worker, place=place), "loader_factory": partial(_loader, place=place)}
    return run_job(_job(place, "ray"), **factories).exit_code


def _drive_on_ray(folder: Path, outcome: Outcome) -> None:
    """Play the run in a driver of its own, and count which of its processes died."""
    (folder / "pids").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = "import sys; from benchmarks.reliability import fuzz_media; sys.exit(fuzz_media.drive(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(folder)]
    driver = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    started = Counter(path.name.partition("-")[0] for path in (folder / "pids").iterdir())
    for kind, name, num_asked in (("reader", "a reader", NUM_READERS), ("vlm", "a VLM actor", 1)):
        num_told = driver.stderr.count(f"{name} was lost")
        outcome.num_deaths[kind] = max(num_told, started[kind] - num_asked)
    _, num_sessions, outcome.num_deaths["driver"] = run_spending(str(folder / "out"))
    if driver.returncode not in _ENDED or num_sessions != 1:
        said = driver.stderr[-500:]
        raise RuntimeError(f"{num_sessions} sessions, exit code {driver.returncode}: {said}")


def _worker(config: JobConfig, run_info: Any, *, place: Path) -> VLMWorker:
    (place / "pids" / f"vlm-{os.getpid()}").touch()
    return digest_worker(config, run_info)


def _loader(config: JobConfig, preprocessor: Any, *, place: Path) -> ItemLoader:
    (place / "pids" / f"reader-{os.getpid()}").touch()
    return build_loader(config, preprocessor)


def main() -> int:
    """Play the given seeds; return 1 where an event happened that must not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seeds", default="0:1000", metavar="FIRST:END", help="or one seed")
    parser.add_argument("--executor", default="local", choices=("local", "ray"), help="ray: all seeds in one run")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the mutants and runs there")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    first, _, end = options.seeds.partition(":")
    seeds = range(int(first), int(end or int(first) + 1))
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        outcome = play(seeds, folder / "ray", "ray") if options.executor == "ray" else play_all(seeds, folder)
    seconds = time.perf_counter() - began_s
    for violation in outcome.violations:
        print(violation)
    print(f"{len(seeds)} mutants in {seconds:.0f} s, {len(outcome.violations)} violations: {dict(outcome.results)}")
    if options.json:
        write_json(options.json, _figures(options.executor, len(seeds), outcome) | {"seconds": seconds})
    return 1 if outcome.violations else 0


def _figures(executor: str, num_mutants: int, outcome: Outcome) -> dict[str, Any]:
    return {
        "benchmark": "fuzz_media",
        "executor": executor,
        "num_mutants": num_mutants,
        "num_readers": NUM_READERS if executor == "ray" else 1,
        "num_deaths": dict(outcome.num_deaths),
        "violations": outcome.violations,
        "results": dict(outcome.results),
    }


if __name__ == "__main__":
    sys.exit(main())

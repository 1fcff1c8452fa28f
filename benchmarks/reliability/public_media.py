"""Runs folders of media that nobody here made through the product's readers, and prints statuses by kind of file.

Every file must have its row; none may crash or hang a reader, be a defect, or be told otherwise on a second pass in
reverse order. Loader, child, scheduler, sink and `verify` are the pipeline's own; the model is a fake whose caption is
a digest of all pixels. Good folders are the test media of public repositories: torchcodec, PyAV, decord, mp4parse,
androidx/media, pdf.js, Pillow, pypdf, exif-samples. Nothing of them is kept here.

    python benchmarks/reliability/public_media.py FOLDER [FOLDER ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks.common.machine import write_json
from pipeline.execution.runner import run_job
from tests.support.models.digest_model import digest_worker
from tests.support.runs import fakes

LOAD_TIMEOUT_S = 60
_VIDEOS = "3g2 3gp asf avi f4v flv h264 hevc ivf m2ts m4v mkv mov mp4 mpeg mpg mts mxf nut ogv ts vob webm wmv"
_IMAGES = "avif bmp dib gif heic ico jfif jp2 jpeg jpg jxl pbm pcx pgm png ppm psd svg tga webp"
KINDS = {"video": _VIDEOS.split(), "image": _IMAGES.split(), "document": ["pdf", "tif", "tiff"]}
_MUST_NOT = ("internal_error", "worker_died", "item_timeout", "load_crashed", "load_timeout")


@dataclass(slots=True)
class Outcome:
    """Holds what became of the files.

    Attributes:
        results: kind -> status or error type -> number of files.
        violations: events that must not happen, with the file.
        failures: file -> error type and message.
    """

    results: dict[str, Counter[str]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def find_media(folders: Iterable[Path]) -> list[tuple[str, Path]]:
    """Return (kind, file) of every file whose extension is known, below all folders."""
    kind_of = {f".{ending}": kind for kind, endings in KINDS.items() for ending in endings}
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [(kind_of[path.suffix.lower()], path) for path in files if path.suffix.lower() in kind_of]


def play(media: Sequence[tuple[str, Path]], folder: Path) -> Outcome:
    """Run all files, and once more in reverse order; compare the rows."""
    outcome = Outcome({kind: Counter() for kind, _ in media})
    passes = [_rows(media, folder / name, outcome, order) for name, order in (("once", 1), ("again", -1))]
    for number, (kind, path) in enumerate(media):
        told = [rows.get(str(number)) for rows in passes]
        if None in told:
            outcome.violations.append(f"{path}: no row")
            continue
        row = told[0]
        outcome.results[kind][row["error_type"] or row["status"]] += 1
        if row["error_message"]:
            outcome.failures[str(path)] = f"{row['error_type'] or row['status']}: {row['error_message']}"
        if row["error_type"] in _MUST_NOT:
            outcome.violations.append(f"{path}: {row['error_type']}: {row['error_message']}")
        first, second = ((one["status"], one["error_type"], one["text"]) for one in told)
        if first != second:
            outcome.violations.append(f"{path}: {first[:2]}, in another order {second[:2]}")
    return outcome


def _rows(media: Sequence[tuple[str, Path]], folder: Path, outcome: Outcome, order: int) -> dict[str, dict[str, Any]]:
    """Return item id -> row of one run; files are copied under their numbers, whatever their names hold."""
    (folder / "media").mkdir(parents=True)
    lines = []
    for number, (kind, path) in enumerate(media):
        name = f"media/{number}{path.suffix.lower()}"
        shutil.copyfile(path, folder / name)
        lines.append(json.dumps({"item_id": str(number), "uri": name, "media_kind": kind}))
    (folder / "manifest.jsonl").write_text("\n".join(lines[::order]))
    config = fakes.job_config(
        folder / "out",
        {"manifest": str(folder / "manifest.jsonl")},
        media={"num_frames": 8, "load_timeout_s": LOAD_TIMEOUT_S},
    )
    try:
        run_job(config, worker_factory=digest_worker)
    except Exception as error:
        outcome.violations.append(f"the run died of {type(error).__name__}: {error}")
        return {}
    outcome.violations += fakes.violations(folder / "out")
    rows = fakes.read_rows(folder / "out")
    ids = Counter(row["item_id"] for row in rows)
    outcome.violations += [f"{media[int(number)][1]}: {count} rows" for number, count in ids.items() if count > 1]
    return {row["item_id"]: row for row in rows}


def main() -> int:
    """Run the given folders; return 1 where an event happened that must not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--show", action="store_true", help="print every file that failed or is partial, and why")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    began_s = time.perf_counter()
    media = find_media(options.folders)
    if not media:
        parser.error(f"no media below {', '.join(map(str, options.folders))}")
    with tempfile.TemporaryDirectory() as temporary:
        outcome = play(media, Path(temporary))
    seconds = time.perf_counter() - began_s
    for path, why in outcome.failures.items() if options.show else ():
        print(f"{path}: {why}")
    for kind, results in outcome.results.items():
        print(f"{kind}: {results.total()} files: {dict(results.most_common())}")
    for violation in outcome.violations:
        print(f"MUST NOT HAPPEN: {violation}")
    print(f"{len(media)} files, twice, in {seconds:.0f} s, {len(outcome.violations)} violations")
    if options.json:
        results = {kind: dict(counts) for kind, counts in outcome.results.items()}
        figures = {"benchmark": "public_media", "num_files": len(media), "results": results, "seconds": seconds}
        write_json(options.json, figures | {"violations": outcome.violations})
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())

"""The house: how many files a room holds, and where README says that things are.

Which room may import which is said in pyproject.toml (`tool.importlinter`), and held by test_import_rules.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_MODULES = 16
# README's "Where is what": a responsibility, the file, and what must be defined in it.
PLACES = {
    "a reducer is added": ("illava/reducers/base.py", "class Reducer"),
    "tokens are merged in a block": ("illava/reduction/vision.py", "class VisionReduction"),
    "the KV cache lives": ("illava/decoder/kv_cache.py", "class PagedCache"),
    "frames are chosen": ("pipeline/loading/video_index/frame_sampling.py", "def "),
    "a PDF page is rendered": ("pipeline/loading/decoding/pages.py", "def "),
    "a shard is committed": ("pipeline/runs/parquet_sink.py", "class ParquetSink"),
    "a retry is decided": ("pipeline/runs/retry.py", "def "),
    "the Ray actors are": ("pipeline/execution/ray/actors.py", "class VLMActor"),
    "a cost is computed": ("pipeline/cost.py", "def "),
    "the error types are listed": ("pipeline/records.py", "RowErrorType"),
}


def files(package: str) -> list[Path]:
    return [path for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"]


def rooms(package: str) -> dict[str, int]:
    """Folders of a package, with the modules each holds itself."""
    found: dict[str, int] = defaultdict(int)
    for path in files(package):
        found[path.parent.relative_to(ROOT).as_posix()] += 1
    return dict(found)


@pytest.mark.parametrize("package", ["illava", "pipeline"])
def test_no_room_is_crowded(package):
    crowded = {room: number for room, number in rooms(package).items() if number > MAX_MODULES}
    crowded.pop("illava/reducers", None)  # one file a method
    assert crowded == {}


@pytest.mark.parametrize("what", PLACES)
def test_readme_says_where_it_is(what):
    path, definition = PLACES[what]
    assert definition in (ROOT / path).read_text("utf-8")
    rows = re.findall(r"^\| *(.+?) *\| *`(.+?)`", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    assert (what, path) in rows

"""The house: rooms, circles and arrows that run back up, read from the import graph; type-only imports count."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_MODULES = 16
# Rooms and single files of each package, from the roof to the ground: an import may only run down.
FLOORS = {
    "illava": [
        ["analysis"],
        ["vlm"],
        ["engine", "token_counts"],
        ["families"],
        ["decoder"],
        ["reduction"],
        ["visual_tokens"],
        ["requests", "plan"],
        ["preprocess", "presets", "reducers"],
        ["attention", "tokens", "model_files"],
        ["checkpoint_check", "devices"],
        ["errors"],
    ],
    "pipeline": [
        ["__main__"],
        ["sweep"],
        ["report"],
        ["cli"],
        ["planning", "lmms_eval_model"],
        ["execution"],
        ["evaluation"],
        ["runs"],
        ["inputs"],
        ["tasks", "loading", "cost"],
        ["config", "exit_codes"],
        ["storage", "known_errors"],
        ["errors", "json_schema", "faults"],
        ["records", "log"],
        ["redaction", "missing_packages", "old_names"],
    ],
}
# README's "Where is what": a responsibility, the file, and what must be defined in it.
PLACES = {
    "a reducer is added": ("illava/reducers/base.py", "class Reducer"),
    "tokens are merged in a block": ("illava/reduction/vision.py", "class VisionReduction"),
    "the KV cache lives": ("illava/decoder/kv_cache.py", "class PagedCache"),
    "frames are chosen": ("pipeline/loading/decoding/frame_sampling.py", "def "),
    "a PDF page is rendered": ("pipeline/loading/decoding/pages.py", "def "),
    "a shard is committed": ("pipeline/runs/parquet_sink.py", "class ParquetSink"),
    "a retry is decided": ("pipeline/runs/retry.py", "def "),
    "the Ray actors are": ("pipeline/execution/ray/actors.py", "class VLMActor"),
    "a cost is computed": ("pipeline/cost.py", "def "),
    "the error types are listed": ("pipeline/records.py", "RowErrorType"),
}


@pytest.fixture(scope="module")
def imports() -> set[tuple[str, str]]:
    """(importer, imported) of every import between modules of the two packages, at any depth."""
    graph = grimp.build_graph("illava", "pipeline", exclude_type_checking_imports=False, cache_dir=None)
    return {(one, other) for one in graph.modules for other in graph.find_modules_directly_imported_by(one)}


def files(package: str) -> list[Path]:
    return [path for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"]


def rooms(package: str) -> dict[str, int]:
    """Folders of a package, with the modules each holds itself."""
    found: dict[str, int] = defaultdict(int)
    for path in files(package):
        found[path.parent.relative_to(ROOT).as_posix()] += 1
    return dict(found)


def circle(edges: set[tuple[str, str]]) -> list[str]:
    """The modules of one circle, or nothing."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for one, other in edges:
        sorter.add(one, other)
    try:
        sorter.prepare()
    except CycleError as error:
        return error.args[1]
    return []


def between_rooms(edges: set[tuple[str, str]]) -> Iterator[tuple[str, set[tuple[str, str]]]]:
    """Of every folder: the imports between what stands directly in it, whole folders as one."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for one, other in edges:
        ours, theirs = one.split("."), other.split(".")
        for depth in range(1, min(len(ours), len(theirs))):
            if ours[:depth] == theirs[:depth] and ours[depth] != theirs[depth]:
                found[".".join(ours[:depth])].add((ours[depth], theirs[depth]))
    return iter(found.items())


def arrows_up(package: str, edges: set[tuple[str, str]]) -> list[str]:
    floor = {room: n for n, rooms_of_floor in enumerate(FLOORS[package]) for room in rooms_of_floor}
    found = []
    for one, other in edges:
        ours, theirs = one.split("."), other.split(".")
        inside = len(ours) > 1 and len(theirs) > 1 and ours[0] == theirs[0] == package and ours[1] != theirs[1]
        if inside and floor[theirs[1]] <= floor[ours[1]]:
            found.append(f"{one} -> {other}")
    return found


def test_no_circle_and_no_arrow_back_up(imports, capsys):
    circles = [found for found in [circle(imports), *(circle(edges) for _, edges in between_rooms(imports))] if found]
    up = {package: sorted(arrows_up(package, imports)) for package in FLOORS}
    with capsys.disabled():
        for package, of_package in up.items():
            print(f"\n{package}: {len(rooms(package))} rooms, {len(circles)} circles, {len(of_package)} arrows back up")
    assert circles == []
    assert up == {"illava": [], "pipeline": []}


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_stands_on_a_floor_and_none_is_crowded(package):
    standing = {path.relative_to(ROOT / package).parts[0].removesuffix(".py") for path in files(package)}
    assert standing == {room for floor in FLOORS[package] for room in floor}
    crowded = {room: number for room, number in rooms(package).items() if number > MAX_MODULES}
    crowded.pop("illava/reducers", None)  # one file a method
    assert crowded == {}


def test_a_circle_and_an_arrow_up_are_seen():
    assert circle({("a", "b"), ("b", "c"), ("c", "a")})
    assert not circle({("a", "b"), ("a", "c"), ("b", "c")})
    assert arrows_up("illava", {("illava.decoder.prefill", "illava.engine.prompt")})
    assert not arrows_up("illava", {("illava.engine.prompt", "illava.decoder.prefill")})
    assert dict(between_rooms({("illava.a.x", "illava.b.y")})) == {"illava": {("a", "b")}}


@pytest.mark.parametrize("what", PLACES)
def test_readme_says_where_it_is(what):
    path, definition = PLACES[what]
    assert definition in (ROOT / path).read_text("utf-8")
    rows = re.findall(r"^\| *(.+?) *\| *`(.+?)`", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    assert (what, path) in rows

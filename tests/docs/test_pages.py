"""What README and the pages may be: length, tables, links, paths that exist, every page in the navigation."""

from __future__ import annotations

import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from tests.support.docs_pages import PAGES, ROOT, links, modules_named, paths_named, tables

# Pages that stand beside what they describe.
OTHER_PAGES = [
    ROOT / name
    for name in (
        "CHANGELOG.md",
        "SECURITY.md",
        "THIRD_PARTY_LICENSES.md",
        "benchmarks/README.md",
        "benchmarks/toy_model/README.md",
    )
]
README_LINES, LARGE_TABLE, LARGE_TABLES = 230, 6, 2


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_readme_is_short_and_has_few_large_tables() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert len([rows for rows in tables(text) if rows > LARGE_TABLE]) <= LARGE_TABLES


def test_a_large_table_is_counted_and_a_code_block_is_none() -> None:
    text = "| a |\n|---|\n" + "| 1 |\n" * 7 + "\ntext\n\n| b |\n|---|\n| 2 |\n\n```\n| c |\n|---|\n```\n"
    assert tables(text) == [7, 1]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_has_one_title(page) -> None:
    assert (
        len(re.findall(r"^# .+$", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M), re.M)) == 1
    )


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=name_of)
def test_links_and_named_paths_exist(page) -> None:
    text = page.read_text("utf-8")
    assert [one for one in links(text) if not (page.parent / one).exists()] == []
    named = {path for path in paths_named(text) if path.removesuffix("/") not in WITHOUT_FILES}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_modules_and_what_is_in_them_exist(page) -> None:
    for name in sorted(modules_named(page.read_text("utf-8")) - NO_MODULES):
        found(name)


def found(name: str) -> object:
    """What a dotted name means: a module, or something in one.

    Raises:
        AttributeError: there is no such thing.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        if base.with_suffix(".py").is_file() or (base / "__init__.py").is_file():
            module = import_module(".".join(parts[:end]))
            return attrgetter(".".join(parts[end:]))(module) if parts[end:] else module
    raise AttributeError(name)


def test_a_module_that_moved_is_seen() -> None:
    assert modules_named("`pipeline.tasks.base.Task`, `gone.gone()`, `s3.x`") == {"pipeline.tasks.base.Task"}
    assert found("pipeline.tasks.base.Task")
    for gone in ("pipeline.tasks.base.Tasks", "pipeline.reading.loader"):
        with pytest.raises(AttributeError):
            found(gone)


@pytest.mark.parametrize("package", ["illava", "pipeline"])
def test_architecture_names_every_room(package) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
    assert [room for room in sorted(rooms) if f"`{room}/`" not in text] == []


# Keys of a part's metadata.
NO_MODULES = {"illava.schema_version"}
# Written by a command, or a name that stands for many.
WITHOUT_FILES = {"benchmarks/results/gpu_all.json", "benchmarks/results/roofline_gpu.json"}


def test_a_broken_link_is_seen() -> None:
    assert links("[a](b.md#c) ![d](e.png) [f](https://g.h) `[i](j.md)`\n```\n[k](l.md)\n```\n") == [
        "b.md",
        "e.png",
        "j.md",
    ]
    assert paths_named("`pipeline/cost.py`, `python jobs/none.py --x`, `s3://jobs/a`, `OUTPUT/data`") == {
        "pipeline/cost.py",
        "jobs/none.py",
    }


def test_every_page_stands_in_the_navigation_once() -> None:
    def pages_in(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inside = entry.values() if isinstance(entry, dict) else entry
        return [page for one in inside for page in pages_in(one)]

    listed = pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert sorted(listed) == sorted(
        page.relative_to(ROOT / "docs").as_posix() for page in PAGES if "docs" in page.parts
    )


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "images" / "kept_tokens.png").stat().st_size < 200_000

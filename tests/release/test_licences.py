"""THIRD_PARTY_LICENSES.md against pyproject.toml, and against what the wheels hold."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import av
import pytest

from docs.generators import licences
from tests.test_dependencies import GROUPS, names
from tests.test_dependencies import PINS as ALL_PINS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "THIRD_PARTY_LICENSES.md").read_text()
PINS = {pin.name: [str(pin.specifier).removeprefix("==")] for pin in ALL_PINS if pin.name in {"av", "decord"}}
FOLDER = Path(av.__file__).parents[1]


def test_every_direct_dependency_is_listed_once() -> None:
    listed = re.findall(r"^\| `(\S+)` \| .+ \| \S.+ \|$", PAGE.partition(licences.GENERATED)[2], flags=re.M)
    assert sorted(listed) == sorted(names(*(group for group in GROUPS if group != "build-system")))


def test_a_dependency_without_a_line_is_named(monkeypatch) -> None:
    monkeypatch.setattr(licences, "dependencies", lambda: {"no-such-package": "`[dev]`"})
    with pytest.raises(SystemExit, match="no-such-package has no line"):
        licences.page()


def told(wheel: str) -> list[str]:
    """The page's lines about what a wheel brings, in the version that is pinned and installed."""
    here = version(wheel)
    if not (FOLDER / f"{wheel}.libs").is_dir() or here not in PINS[wheel]:
        pytest.skip(f"{wheel} {here} is not the wheel for Linux that constraints.txt pins")
    lines = [line for line in PAGE.splitlines() if re.match(rf"\| `{wheel}` \d", line)]
    assert all(line.startswith(f"| `{wheel}` {here} | ") for line in lines)
    return lines


@pytest.mark.parametrize("wheel", ["decord", "av"])
def test_the_ffmpeg_that_a_wheel_brings_is_the_one_that_is_told(wheel) -> None:
    lines = told(wheel)
    [library] = (FOLDER / f"{wheel}.libs").glob("libavcodec-*")
    data = library.read_bytes()
    found = {name.decode() for name in re.findall(rb"FFmpeg version (\d[\d.]*)", data)}
    said = {name.decode() for name in re.findall(rb"libavcodec license: ([\w ]+)", data)}
    assert [name for name in found if f"FFmpeg {name}" not in lines[0]] == []
    assert [name for name in said if f'"{name}"' not in lines[0]] == []
    assert found
    assert said


def test_the_gpl_libraries_beside_pyav_are_told() -> None:
    lines = told("av")
    gpl = {path.name[3:7] for path in (FOLDER / "av.libs").glob("libx26[45]-*")}
    assert {name for name in ("x264", "x265") if name in lines[1]} == gpl

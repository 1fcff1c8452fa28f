"""What pyproject.toml asks for: bounds above, and every package that the code itself imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
GROUPS = {
    "build-system": PYPROJECT["build-system"]["requires"],
    "dependencies": PROJECT["dependencies"],
    **PROJECT["optional-dependencies"],
}
BOUNDS_ABOVE = {"<", "<=", "==", "~="}


def names(*groups: str) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for group in groups for line in GROUPS[group]}


def unbounded(lines: list[str]) -> list[str]:
    return [line for line in lines if not BOUNDS_ABOVE & {part.operator for part in Requirement(line).specifier}]


@pytest.mark.parametrize("group", GROUPS)
def test_every_dependency_has_a_bound_above(group) -> None:
    """A fresh install takes the newest there is: the next major version may break what stood (filelock 4 did)."""
    assert unbounded(GROUPS[group]) == []


def test_a_missing_bound_is_seen() -> None:
    assert unbounded(["a", "b>=2", "c>=2,!=2.1", "d>=1,<2", "e==1.*", "f~=1.2"]) == ["a", "b>=2", "c>=2,!=2.1"]


def test_the_installed_versions_are_admitted() -> None:
    """Those of the suite that passes here, and of a machine that brings its own torch and transformers."""
    wanted = [Requirement(line) for line in GROUPS["dependencies"]]
    here = [one for one in wanted if one.marker is None or one.marker.evaluate()]
    refused = [f"{one}: {version(one.name)}" for one in here if not one.specifier.contains(version(one.name), True)]
    assert refused == []


@pytest.mark.parametrize("group", GROUPS)
def test_one_package_has_one_range(group) -> None:
    ranges = {Requirement(line).name: Requirement(line).specifier for lines in GROUPS.values() for line in lines}
    assert all(ranges[Requirement(line).name] == Requirement(line).specifier for line in GROUPS[group])


# lmms-eval has a recipe of its own; a CUDA torch brings its triton.
ELSEWHERE = {"lmms-eval", "triton"}


def test_every_package_that_is_imported_is_asked_for() -> None:
    """Else another package's dependencies decide on its version, and whether it is there at all."""
    imported = set()
    for path in (path for folder in ("illava", "pipeline", "jobs") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            imported |= {name.partition(".")[0] for name in found}
    imported -= sys.stdlib_module_names | {"illava", "pipeline", "jobs"}
    by_module = packages_distributions()
    wanted = {canonicalize_name(by_module.get(name, [name])[0]) for name in imported}
    assert len(wanted) > 15
    assert wanted - ELSEWHERE <= names("dependencies", "s3", "gcs", "plots")


def test_lmms_eval_is_installed_by_one_recipe() -> None:
    """Its own pin stands outside pyproject.toml, in every text that says how to install it."""
    paths = ("docs/recipes/lmms-eval.md", "Makefile", "benchmarks/accuracy/lmms_eval_check.py")
    told = {path: (ROOT / path).read_text() for path in paths}
    told["pyproject.toml"] = (ROOT / "pyproject.toml").read_text()
    for path, text in told.items():
        assert set(re.findall(r"--no-deps lmms-eval==(\S+?)[`\s]", text + "\n")) == {"0.7.3"}, path
    [filelock] = [line for line in GROUPS["lmms-eval"] if line.startswith("filelock")]
    assert "4.0" not in Requirement(filelock).specifier

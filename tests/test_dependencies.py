"""What pyproject.toml asks for: bounds above, every package that the code itself imports, and a pin of each."""

from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires, version
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
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
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
    own = {"illava", "pipeline", "jobs", "benchmarks"}  # the demo measures layers as the benchmarks do
    imported -= sys.stdlib_module_names | own
    by_module = packages_distributions()
    wanted = {canonicalize_name(by_module.get(name, [name])[0]) for name in imported}
    assert len(wanted) > 15
    assert wanted - ELSEWHERE <= names("dependencies", "s3", "gcs", "plots", "quantized", "adapters")


def test_lmms_eval_is_installed_by_one_recipe() -> None:
    """Its own pin stands outside pyproject.toml, in every text that says how to install it."""
    paths = ("docs/recipes/lmms-eval.md", "Makefile", "benchmarks/accuracy/lmms_eval_check.py")
    told = {path: (ROOT / path).read_text() for path in paths}
    told["pyproject.toml"] = (ROOT / "pyproject.toml").read_text()
    for path, text in told.items():
        assert set(re.findall(r"--no-deps lmms-eval==(\S+?)[`\s]", text + "\n")) == {"0.7.3"}, path
    [filelock] = [line for line in GROUPS["lmms-eval"] if line.startswith("filelock")]
    assert "4.0" not in Requirement(filelock).specifier


# What a marker of constraints.txt can ask for on the machines that the project is for.
MACHINES = {
    f"{python} on {machine}": {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "darwin" if machine == "arm64" else "linux",
        "platform_system": "Darwin" if machine == "arm64" else "Linux",
        "platform_machine": machine,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    for python in ("3.11", "3.12")
    for machine in ("x86_64", "aarch64", "arm64")
}


def pins_on(machine: str, pins: list[Requirement]) -> dict[str, list[str]]:
    """The versions that constraints.txt allows of each package there."""
    found: dict[str, list[str]] = {}
    for pin in pins:
        if pin.marker is None or pin.marker.evaluate(MACHINES[machine]):
            found.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    return found


def not_pinned(lines: list[str], machine: str, pins: list[Requirement]) -> list[str]:
    """Of the requirements ``lines``: those without one pin, or with one outside their bounds."""
    pinned, found = pins_on(machine, pins), []
    for wanted in map(Requirement, lines):
        if wanted.marker is None or wanted.marker.evaluate(MACHINES[machine]):
            versions = pinned.get(canonicalize_name(wanted.name), [])
            if len(versions) != 1 or not wanted.specifier.contains(versions[0], True):
                found.append(f"{wanted}: {versions}")
    return found


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("group", [name for name in GROUPS if name != "build-system"])
def test_every_dependency_has_a_pin_inside_its_bounds(group, machine) -> None:
    """Else run: make lock."""
    assert not_pinned(GROUPS[group], machine, PINS) == []


@pytest.mark.parametrize("machine", MACHINES)
def test_what_the_dependencies_lead_to_is_pinned_too(machine) -> None:
    """A file of direct dependencies alone would let every other package float."""
    pinned, here = pins_on(machine, PINS), {canonicalize_name(one.name) for one in PINS}
    assert all(len(versions) == 1 for versions in pinned.values())
    for line in (line for name in ("dependencies", "dev", "lmms-eval") for line in GROUPS[name]):
        name = Requirement(line).name
        needed = [Requirement(one) for one in (requires(name) or []) if "extra ==" not in one]
        assert {canonicalize_name(one.name) for one in needed if one.marker is None} <= here, name


def test_a_missing_pin_and_one_out_of_bounds_are_seen() -> None:
    pins = [Requirement(line) for line in ("a==1.5", "b==3", "c==1; python_version < '3.12'")]
    lines = ["a>=1,<2", "b>=1,<2", "c>=1,<2", "d>=1,<2", "e>=1,<2; platform_machine == 'aarch64'"]
    assert [line[0] for line in not_pinned(lines, "3.12 on x86_64", pins)] == ["b", "c", "d"]
    assert [line[0] for line in not_pinned(lines, "3.11 on aarch64", pins)] == ["b", "d", "e"]


def test_pytest_xdist_keeps_a_group_in_one_process(request) -> None:
    """pytest-xdist 3.8 writes a group behind a test's id, where pytest 9.2 does not look: none was kept together."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("this is no process of pytest-xdist")
    assert request.node.nodeid.endswith("@tests/test_dependencies.py")


def test_torch_is_pinned_without_a_build() -> None:
    """`==2.13.0` takes the CPU build and the CUDA build alike; `==2.13.0+cpu` would take one."""
    [torch] = [pin for pin in PINS if pin.name == "torch"]
    assert "+" not in str(torch.specifier)


def test_ci_installs_what_is_pinned() -> None:
    """Every install of the Makefile, which is all that .ci/run runs, takes the pins or takes no dependency at all."""
    makefile = (ROOT / "Makefile").read_text()
    installs = [line.strip() for line in makefile.splitlines() if "/pip install" in line and "build/uv" not in line]
    assert len(installs) == 4
    assert [line for line in installs if "-c constraints.txt" not in line and "--no-deps" not in line] == []
    assert "pip install" not in (ROOT / ".ci" / "run").read_text()

"""Who may import whom: the contracts of pyproject.toml, and what no contract can say; what importing costs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("illava", "pipeline", "jobs")
CONTRACTS = [
    one["name"] for one in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
]
# What a family and the tower's reduction call may know of reducers: what any of them is, but none by name.
NO_REDUCER = ("illava/families/", "illava/reduction/vision.py", "illava/decoder")
ANY_REDUCER = {"AnyReducer", "Evidence", "EvidenceKind", "Reducer", "Scope", "Stage", "base"}


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter; in a process of its own, since in this one it would switch off every other logger."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    plain = {"PATH": os.defpath, "COLUMNS": "200"}  # whatever this terminal asks for: no colours, a name on one line
    return subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, check=False)


def test_the_contracts_are_kept() -> None:
    """Else run: .venv/bin/lint-imports. It says which line imports what."""
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# One line for each contract: the file that it is added to, and what breaks that contract there.
OFFENCES = {
    "Imports run one way: jobs -> pipeline -> illava": ("illava/tokens.py", "import pipeline.records"),
    "illava: imports run down, and every room has its floor": ("illava/newcomer.py", ""),
    "pipeline: imports run down, and every room has its floor": ("pipeline/storage/storage.py", "import pipeline.cli"),
    "No circles: between rooms, nor between the files of one": (
        "pipeline/runs/run_folder.py",
        "import pipeline.runs.run",
    ),
    "A reducer does not import the registry of reducers": ("illava/reducers/tome.py", "import illava.reducers"),
    "A large dependency has one door": ("pipeline/cost.py", "def f():\n    import pyarrow.parquet as pq"),
    "Families, the decoder and the tower's reduction know no reducer by name": (
        "illava/families/base.py",
        "import illava.reducers.fastv",
    ),
}


def test_every_contract_can_break(tmp_path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path, line in OFFENCES.values():
        with (tmp_path / path).open("a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
    told = " ".join(lint(tmp_path).stdout.split())
    assert list(OFFENCES) == CONTRACTS
    assert [name for name in CONTRACTS if f"{name} BROKEN" not in told] == []


def imported_names(tree: ast.AST, module: str) -> Iterator[str]:
    """Full name of everything that an import of the source can name, at any depth; type checking alone does not run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            yield from (f"{name}.{alias.name}" for alias in node.names)
        yield from imported_names(node, module)


def broken_rules(path: str, text: str) -> list[str]:
    """Every rule about names inside a module that the source ``text`` would break if it stood at ``path``."""
    broken = []
    for full in imported_names(ast.parse(text), path.removesuffix(".py").replace("/", ".")):
        package, *inside = full.split(".")
        if path.startswith(NO_REDUCER) and full.startswith("illava.reducers.") and inside[1] not in ANY_REDUCER:
            broken.append(f"{path} imports {full}; it must know no reducer by name")
        is_foreign = package in PACKAGES and package != path.partition("/")[0]
        if is_foreign and any(part.startswith("_") and not part.endswith("__") for part in inside):
            broken.append(f"{path} imports {full}, which is private to {package}")
    return broken


def test_names_keep_the_rules() -> None:
    sources = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    broken = [
        line for path in sources for line in broken_rules(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    ]
    assert not broken, "\n".join(broken)
    assert len(sources) > 15


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pipeline/x.py", "from illava.plan import _draw"),
        ("illava/families/x.py", "from illava.reducers import illava"),
        ("illava/families/x.py", "from ..reducers import ToMe"),
        ("illava/reduction/vision.py", "from illava.reducers.fastv import FastV"),
    ],
)
def test_a_broken_rule_is_seen(path, text) -> None:
    assert broken_rules(path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pipeline/x.py", "if TYPE_CHECKING:\n    from illava.plan import _draw"),
        ("pipeline/x.py", "from illava import __version__"),
        ("illava/families/x.py", "from illava.reducers import Evidence"),
        ("illava/x.py", "from illava.reducers.illava import ILLaVA"),
    ],
)
def test_what_is_allowed_is_allowed(path, text) -> None:
    assert not broken_rules(path, text)


CONFIG = """
from pipeline.config.schema import JobConfig
JobConfig.model_validate({
    "input": {"uri": "in/"}, "model": {"model_id": "m"}, "reduction": {"preset": "illava-video"},
    "output": {"uri": "out/"},
})
"""


@pytest.mark.parametrize(
    "code",
    [
        "import pipeline",
        CONFIG,
        "import illava.preprocess",
        "import illava.token_counts",
        "import illava; illava.load_preprocessor; illava.preset; illava.Request",
        "import pipeline; pipeline.load_config; pipeline.JobConfig; pipeline.PipelineError",
    ],
    ids=["pipeline", "config", "preprocess", "counts", "public names of illava", "public names of pipeline"],
)
def test_import_stays_light(code):
    heavy = ["torch", "transformers", "ray", "decord", "av", "pyarrow", "fsspec", "scipy", "matplotlib"]
    check = f"{code}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")

"""The rules of who may import what, read from the sources; and what importing costs, seen from a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("illava", "pipeline", "jobs")

MEDIA = {"pipeline/loading/decoding/media.py"}
ROWS = ("storage/parquet", "runs/parquet_sink", "runs/row_schema", "runs/verify", "runs/totals")
READERS = ("evaluation/compare", "evaluation/benchmarks/convert", "sweep/results")  # of what stands in Parquet already
# One dependency, one door. Folders end with a slash.
DOORS: dict[str, set[str]] = {
    "ray": {"pipeline/execution/ray/actors.py", "pipeline/execution/runner.py"},
    "fsspec": {"pipeline/storage/storage.py"},
    "s3fs": {"pipeline/storage/storage.py"},
    "decord": MEDIA,
    "av": {"pipeline/loading/decoding/pyav_video.py"},
    "pypdfium2": {"pipeline/loading/decoding/pages.py"},
    "PIL": {"pipeline/loading/decoding/pictures.py", "illava/preprocess.py", "pipeline/report/raster.py"},
    "lmms_eval": {"pipeline/lmms_eval_model.py"},
    "pyarrow": {"pipeline/inputs/", *(f"pipeline/{name}.py" for name in (*ROWS, *READERS))},
    "jinja2": {"pipeline/report/html.py"},
    "matplotlib": {"pipeline/sweep/picture.py", "pipeline/sweep/svg.py"},
    "rapidfuzz": {"pipeline/tasks/metrics.py"},
    "scipy": {"pipeline/evaluation/statistics.py", "pipeline/planning/estimate.py"},
    "torch": {"illava/", "pipeline/execution/ray/actors.py", "pipeline/execution/worker.py"},
    "transformers": {"illava/"},
}
# Imports go one way: jobs -> pipeline -> illava; reducers and families do not know each other.
FORBIDDEN: dict[str, set[str]] = {
    "illava/": {"pipeline", "jobs"},
    "pipeline/": {"jobs"},
    "illava/reducers/": {"illava.families", "illava.reduction", "illava.decoder", "illava.engine", "illava.vlm"},
    "illava/families/": {"illava.engine", "illava.vlm"},
}
# What a family and the tower's reduction call may know of reducers: what any of them is, but none by name.
NO_REDUCER = ("illava/families/", "illava/reduction/vision.py", "illava/decoder")
ANY_REDUCER = {"AnyReducer", "Evidence", "EvidenceKind", "Reducer", "Scope", "Stage", "base"}


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, str]]:
    """(module, imported name) of every import that can run, at any depth; type checking alone does not run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            yield from ((name, alias.name) for alias in node.names)
        yield from imports(node, module)


def broken_rules(path: str, text: str) -> list[str]:
    """Every rule that the source ``text`` would break if it stood at ``path``."""
    broken = []
    for name, member in imports(ast.parse(text), path.removesuffix(".py").replace("/", ".")):
        full = f"{name}.{member}" if member else name
        doors = DOORS.get(name.split(".")[0])
        if doors is not None and not any(path == door or (door[-1] == "/" and path.startswith(door)) for door in doors):
            broken.append(f"{path} imports {name}; only {', '.join(sorted(doors))} may")
        for folder, forbidden in FORBIDDEN.items():
            if path.startswith(folder) and any(f"{full}.".startswith(f"{other}.") for other in forbidden):
                broken.append(f"{path} imports {full}; nothing in {folder} may")
        if (
            path.startswith(NO_REDUCER)
            and full.startswith("illava.reducers.")
            and full.split(".")[2] not in ANY_REDUCER
        ):
            broken.append(f"{path} imports {full}; it must know no reducer by name")
        foreign = name.split(".")[0] in PACKAGES and name.split(".")[0] != path.split("/", maxsplit=1)[0]
        if foreign and any(part.startswith("_") and not part.endswith("__") for part in full.split(".")):
            broken.append(f"{path} imports {full}, which is private to {name.split('.')[0]}")
    return broken


def test_sources_keep_the_rules():
    broken = [
        line for path in sources() for line in broken_rules(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    ]
    assert not broken, "\n".join(broken)
    assert len(sources()) > 15


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("illava/x.py", "import pipeline.config.schema"),
        ("illava/x.py", "from ray import remote"),
        ("pipeline/x.py", "def f():\n    import ray"),
        ("pipeline/x.py", "import pyarrow.parquet as pq"),
        ("pipeline/execution/runner.py", "import torch"),
        ("pipeline/runs/run.py", "from jobs import caption_videos"),
        ("pipeline/x.py", "from illava.plan import _draw"),
        ("illava/reducers/x.py", "from illava.families.llava.geometry import AnyresGeometry"),
        ("illava/reducers/x.py", "from ..families import anyres"),
        ("illava/families/x.py", "from illava.reducers import illava"),
        ("illava/families/x.py", "from illava.reducers import ToMe"),
        ("illava/reduction/vision.py", "from illava.reducers.fastv import FastV"),
        ("illava/x.py", "try:\n    from PIL import Image\nexcept ImportError:\n    Image = None"),
    ],
)
def test_a_broken_rule_is_seen(path, text):
    assert broken_rules(path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("pipeline/records.py", "if TYPE_CHECKING:\n    import torch"),
        ("pipeline/execution/runner.py", "import ray"),
        ("pipeline/x.py", "from illava.plan import ReductionPlan"),
        ("pipeline/x.py", "from illava import __version__"),
        ("illava/families/x.py", "from illava.reducers import Evidence"),
        ("illava/x.py", "from illava.reducers.illava import ILLaVA"),
    ],
)
def test_what_is_allowed_is_allowed(path, text):
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

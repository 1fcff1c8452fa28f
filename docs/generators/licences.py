"""THIRD_PARTY_LICENSES.md's table: every direct dependency, and its licence in the words of its own metadata.

Read from the packages that are installed here in the version that constraints.txt pins; the line of any other stays.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docs.generators.markdown import GENERATED, table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "THIRD_PARTY_LICENSES.md"
END = "<!-- end of what is generated -->"
_LONGEST = 60  # some packages put the licence's whole text into the field for its name


def page() -> str:
    """The whole file, with its table made anew."""
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(GENERATED)
    standing = dict(re.findall(r"^\| `(\S+)` \| .+? \| (.+?) \|$", rest, flags=re.MULTILINE))
    rows = [(f"`{name}`", groups, _licence(name, standing)) for name, groups in dependencies().items()]
    made = table(("package", "asked for by", "licence, as its metadata says"), rows)
    return f"{before}{GENERATED}\n\n{made}\n\n{END}{rest.partition(END)[2]}"


# Whose metadata names no licence: what the LICENSE file in its wheel is.
_BY_FILE = {"torchao": "BSD-3-Clause (its LICENSE file)"}


def dependencies() -> dict[str, str]:
    """Each direct dependency, and where pyproject.toml asks for it; those of every installation first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = {"every installation": project["dependencies"]}
    groups |= {f"`[{name}]`": lines for name, lines in project["optional-dependencies"].items()}
    found: dict[str, list[str]] = {}
    for group, lines in groups.items():
        for line in lines:
            found.setdefault(canonicalize_name(Requirement(line).name), []).append(group)
    return {name: ", ".join(where) for name, where in found.items()}


def _licence(name: str, standing: dict[str, str]) -> str:
    pinned = re.findall(
        rf"^{re.escape(name)}==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), flags=re.MULTILINE
    )
    try:
        said = metadata(name)
    except PackageNotFoundError:
        said = None
    if said is None or said["Version"].partition("+")[0] not in pinned:
        if name in standing:
            return standing[name]
        raise SystemExit(f"{name} has no line in {PAGE.name} yet: install it in its pinned version, and run this again")
    classifiers = [
        line.rpartition(" :: ")[2] for line in said.get_all("Classifier", []) if line.startswith("License ::")
    ]
    named = said.get("License") or ""
    words = [said.get("License-Expression"), named if len(named) <= _LONGEST else None, *classifiers]
    return next((word for word in words if word), None) or _BY_FILE[name]

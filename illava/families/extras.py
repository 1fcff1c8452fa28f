"""Asks for the packages of an optional extra, and names the command that installs them. Torch-free."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

from illava.errors import ModelLoadError


def require_packages(extra: str, *modules: str, purpose: str) -> None:
    """Refuse what needs packages that are not installed.

    Raises:
        ModelLoadError: names the packages, and the command that installs the extra.
    """
    if lacking := [name for name in modules if find_spec(name) is None]:
        raise ModelLoadError(
            f"{purpose} needs {' and '.join(lacking)}, which {sys.executable} does not have; install the extra "
            f"{extra!r}: {sys.executable} -m pip install {shlex.join(_requirements(extra) or lacking)}"
        )


def _requirements(extra: str) -> list[str]:
    """What an extra asks for, with its bounds: the project's own name may be another's on a package index."""
    try:
        lines = [line.replace('"', "'").partition(";") for line in requires("illava") or []]
    except PackageNotFoundError:
        return []
    return [wanted.strip() for wanted, _, marker in lines if f"extra == '{extra}'" in marker]

"""Carries out a Dockerfile without Docker: a folder stands for its root, a fresh virtual environment for its base."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One instruction: its word, and the rest of its line with continued lines joined."""

    word: str
    rest: str


def steps_of(text: str) -> list[Step]:
    """The instructions, without comments."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n", " ", lines)
    return [Step(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


class Image:
    """What the steps have made so far.

    Attributes:
        root: stands for ``/``.
        folder: where the next step works, below ``root``.
        environment: what its commands find: this process's, less its Python, with the base image's first on the PATH.
        entrypoint: words of the command; its program is that of the image.
    """

    def __init__(self, root: Path, context: Path) -> None:
        self.root, self.folder, self.entrypoint = root, root, [""]
        self._context = context
        base = root / "usr" / "local"
        subprocess.run([sys.executable, "-m", "venv", base], check=True)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
        } | {
            "PATH": f"{base / 'bin'}{os.pathsep}{os.defpath}",
            "PIP_NO_COMPILE": "1",
        }  # which saves a third of the time
        self.program = base / "bin"

    def take(self, step: Step) -> None:
        """Carry out one step.

        Raises:
            ValueError: the instruction is none of those that can be carried out here.
            subprocess.CalledProcessError: a RUN line failed.
        """
        match step.word:
            case "FROM":
                pass
            case "WORKDIR":
                self.folder = self.root / step.rest.lstrip("/")
                self.folder.mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, target = step.rest.split()
                for source in sources:
                    self._copy(source, self.folder / target)
            case "RUN":
                subprocess.run(["sh", "-c", step.rest], cwd=self.folder, env=self.environment, check=True)
            case "ENTRYPOINT":
                self.entrypoint = json.loads(step.rest)
            case _:
                raise ValueError(f"{step.word} cannot be carried out without Docker")

    def run(self, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run the entrypoint with ``words``, in ``folder``."""
        program = shutil.which(self.entrypoint[0], path=str(self.program))
        if program is None:
            raise FileNotFoundError(f"{self.entrypoint[0]} is not in {self.program}")
        command = [program, *self.entrypoint[1:], *words]
        return subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True, check=False)

    def _copy(self, source: str, target: Path) -> None:
        path = self._context / source
        if path.is_dir():  # the contents of a folder, as Docker copies it
            shutil.copytree(path, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)

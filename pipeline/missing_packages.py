"""Says which Python lacks a package, and the command that installs it.

Works in a Python where nothing is installed, so it imports the standard library alone.
"""

from __future__ import annotations

import os
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]  # the repository, or the site-packages that a wheel was installed in
_OWN = ("illava", "pipeline", "jobs")
# What the project itself does not install: packages of an extra, and those that a checkpoint or a machine may ask for.
_EXTRAS = {
    **dict.fromkeys(("s3fs", "aiobotocore", "botocore", "boto3"), "s3"),
    **dict.fromkeys(("gcsfs", "google"), "gcs"),
    "matplotlib": "plots",
    **dict.fromkeys(("compressed_tensors", "torchao"), "quantized"),
    "peft": "adapters",
    **dict.fromkeys(("lmms_eval", "evaluate", "sacrebleu", "loguru"), "lmms-eval"),
    **dict.fromkeys(("pytest", "hypothesis", "moto", "skvideo", "pandas", "duckdb", "datasets"), "dev"),
}
_ON_THEIR_OWN = {
    "torchvision": "torchvision of the build that fits this torch (https://pytorch.org/get-started/locally)",
    "accelerate": "accelerate",
    "tensorflow": "tensorflow",
    "triton": "triton",
}


def missing_package(error: ImportError) -> str | None:
    """Say what an import that failed lacks; None where it is this project's own module that lacks something.

    Args:
        error: ``ModuleNotFoundError`` of a package, or an ``ImportError`` of one that does not fit or wants another.
    """
    name = (error.name or "").partition(".")[0]
    if name in _OWN:
        return None
    if name in sys.stdlib_module_names:
        return (
            f"{sys.executable} (Python {sys.version.split()[0]}) was built without a part of the standard library: "
            f"{error}. Take a whole Python 3.11 or newer"
        )
    if isinstance(error, ModuleNotFoundError) and name:
        wanted = f"has no package {name!r}"
    else:
        wanted = f"has a package that is missing, or not of the version that is needed: {_first_lines(error)}"
    return f"{_here()} {wanted}; {_command(name, str(error))}"


def install_extra(extra: str) -> str:
    """Return the command that installs an extra of this project into this Python."""
    return _install_project(extra)


def _here() -> str:
    node = os.environ.get("RAY_NODE_IP") or os.uname().nodename if "RAY_JOB_ID" in os.environ else ""
    return sys.executable + f" on node {node}" * bool(node)


def _command(name: str, text: str) -> str:
    asked = name if name in _ON_THEIR_OWN else next((one for one in _ON_THEIR_OWN if one in text.lower()), "")
    if asked:
        return f"install {_ON_THEIR_OWN[asked]}: {_pip(asked)}"
    if name == "decord":
        return "it has no wheel for this machine: --set media.decoder=pyav reads the videos without it"
    if name in _EXTRAS:
        return f"install it: {install_extra(_EXTRAS[name])}"
    environment = _ROOT / ".venv"
    python = environment / "bin" / "python"
    if Path(sys.prefix) == environment or not _is_checkout():
        return f"install what the project needs: {_install_project()}"
    return (
        f"the project's packages are in {environment} (`make demo` installs them there): run\n"
        f"  {shlex.join([_short(python), *_arguments()])}\n"
        f"or, for `ray job submit`, start Ray with them: . {_short(environment)}/bin/activate && ray start --head\n"
        f"or install them into this Python: {_install_project()}"
    )


def _is_checkout() -> bool:
    return (_ROOT / "pyproject.toml").is_file()


def _install_project(extra: str = "") -> str:
    """The command that installs an extra, or all that the project cannot do without.

    A checkout installs itself. Beside a wheel no folder is known to install, and the project's name may be another's
    on a package index, so the packages are named themselves.
    """
    if _is_checkout():
        return _pip(f"-e {shlex.quote(f'{_ROOT}[{extra}]' if extra else str(_ROOT))}")
    try:
        lines = requires("illava") or []
    except PackageNotFoundError:
        lines = []
    if extra:
        marked = (line.replace('"', "'").partition(";") for line in lines)
        wanted = [name.strip() for name, _, marker in marked if f"extra == '{extra}'" in marker]
    else:
        wanted = [line for line in lines if "extra ==" not in line]
    return _pip(shlex.join(wanted)) if wanted else f"the wheel of illava again, with {extra or 'its dependencies'}"


def _pip(what: str) -> str:
    return f"{shlex.quote(sys.executable)} -m pip install {what}"


def _arguments() -> list[str]:
    """The command that is running, as typed behind ``python``."""
    program = Path(sys.argv[0]).resolve()
    if program.name == "__main__.py":
        return ["-m", program.parent.name, *sys.argv[1:]]
    if program.name == "illava":  # the console command of another Python
        return ["-m", "pipeline", *sys.argv[1:]]
    return [_short(program), *sys.argv[1:]]


def _short(path: Path) -> str:
    """Relative to the working directory, where it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _first_lines(error: ImportError) -> str:
    return " ".join(str(error).split())[:300]

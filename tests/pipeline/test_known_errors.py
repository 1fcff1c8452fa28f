"""What the jobs say of errors that are not theirs: a Python without packages, and every kind in the table."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
import venv
from importlib import import_module
from pathlib import Path

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml
from PIL import Image
from safetensors import safe_open

from pipeline import known_errors, missing_packages
from pipeline.exit_codes import guarded
from pipeline.known_errors import known_error
from pipeline.missing_packages import missing_package
from pipeline.report.html import render_html

ROOT = Path(__file__).resolve().parents[2]
JOBS = {
    "answer_questions": ["--config", "configs/answer_questions.yaml"],
    "caption_images": ["--config", "configs/caption_images_llava_next.yaml"],
    "caption_videos": ["--config", "configs/demo.yaml"],
    "demo": [],
    "draw_kept_tokens": ["--config", "configs/draw_demo.yaml"],
    "process_documents": ["--config", "configs/process_documents.yaml", "--dry-run"],
    "sweep_reduction": ["--config", "configs/sweep_demo.yaml"],
}


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A real virtual environment in which nothing is installed, not even pip."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "env", with_pip=False)
    return folder / "env" / "bin" / "python"


def bare(python: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_every_job_is_asked() -> None:
    assert JOBS.keys() == {path.stem for path in (ROOT / "jobs").glob("*.py")}


COMMANDS = [[f"jobs/{job}.py", *arguments] for job, arguments in JOBS.items()]
COMMANDS += [["-m", "pipeline", *rest] for rest in (["verify", "x"], ["status", "x"], ["retry", "x"], ["report", "x"])]
COMMANDS += [["-m", "pipeline", "caption", *JOBS["caption_videos"]]]
COMMANDS += [["-m", "pipeline", "export", "x", "--format", "csv", "--to", "x.csv"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:3]))
def test_a_python_without_packages_is_told_where_they_are_and_how_to_install_them(bare_python, command) -> None:
    done = bare(bare_python, *command)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "defect" not in done.stderr
    assert f"{bare_python} has no package '" in done.stderr
    assert f".venv/bin/python {' '.join(command)}\n" in done.stderr, "the same command, in the project's environment"
    assert f"{bare_python} -m pip install -e {ROOT}" in done.stderr
    assert "ray start" in done.stderr


@pytest.mark.parametrize("command", [*(f"jobs/{job}.py" for job in JOBS), "-m pipeline"])
def test_a_python_without_packages_still_helps(bare_python, command) -> None:
    done = bare(bare_python, *command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs")])
def test_a_store_without_its_packages_names_the_extra(monkeypatch, capsys, scheme, extra) -> None:
    from pipeline.storage import storage

    package = {"s3": "s3fs", "gcs": "gcsfs"}[extra]
    monkeypatch.setitem(sys.modules, package, None)  # how Python says of a package that it is not there
    monkeypatch.setitem(sys.modules, "pipeline.storage.s3_session", None)
    storage._open_store.cache_clear()
    assert guarded(lambda: print(storage.list_objects(f"{scheme}://bucket/x")) or 0, debug=False) == 2
    said = capsys.readouterr().err
    assert f"{sys.executable} -m pip install -e '{ROOT}[{extra}]'" in said
    assert "defect" not in said


MISSING = [
    (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), "-m pip install torchvision"),
    (ModuleNotFoundError("No module named 'accelerate'", name="accelerate"), "-m pip install accelerate"),
    (ImportError("Using `device_map` requires `accelerate`. Try `pip install accelerate`"), "pip install accelerate"),
    (ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it"), "pip install torchvision"),
    (ModuleNotFoundError("No module named 'decord'", name="decord"), "--set media.decoder=pyav"),
    (ModuleNotFoundError("No module named 'PIL.Image'", name="PIL.Image"), f"pip install -e {ROOT}"),
    (ModuleNotFoundError("No module named 'moto'", name="moto"), f"pip install -e '{ROOT}[dev]'"),
    (ImportError("libcudart.so.13: cannot open shared object file"), f"pip install -e {ROOT}"),
    (ImportError("cannot import name 'x' from 'transformers'", name="transformers"), f"pip install -e {ROOT}"),
    (ModuleNotFoundError("No module named '_lzma'", name="_lzma"), "standard library"),
]


@pytest.mark.parametrize(("error", "command"), MISSING, ids=lambda value: str(value)[:40])
def test_each_missing_package_has_its_command(error, command) -> None:
    known = known_error(error)
    assert known.exit_code == 2
    assert command in known.words
    assert not known.words.startswith("\n")


def test_beside_a_wheel_the_packages_are_named_themselves(monkeypatch, tmp_path) -> None:
    """No folder is there to install from, and `pip install illava` would be whatever an index has of that name."""
    monkeypatch.setattr(missing_packages, "_ROOT", tmp_path)
    extra = shlex.split(missing_packages.install_extra("s3"))[4:]
    assert [re.match(r"\w+", word)[0] for word in extra] == ["s3fs", "aiobotocore"]
    words = missing_package(ModuleNotFoundError("No module named 'PIL'", name="PIL"))
    packages = shlex.split(words.partition(" -m pip install ")[2])
    assert {"pillow", "torch", "decord"} <= {re.match(r"[\w-]+", word)[0] for word in packages}
    assert len(packages) > 15
    assert str(tmp_path) not in words


def _of(function, *arguments) -> Exception:
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("it was expected to fail")


def _hub(kind: str) -> Exception:
    from huggingface_hub import errors

    made = getattr(errors, kind)
    return made.__new__(made, "401 Client Error")  # its own __init__ wants an answer of whichever client is in use


def _torch(message: str, kind: str = "OutOfMemoryError") -> Exception:
    import torch

    return getattr(torch, kind)(message)


def _no_cuda(tmp_path) -> Exception:
    import torch

    if torch.backends.cuda.is_built():
        pytest.skip("this torch has CUDA")
    return _of(lambda: torch.zeros(1, device="cuda"))


def _ray(kind: str) -> Exception:
    from ray import exceptions

    return getattr(exceptions, kind)("lost")


# Real errors, made by what raises them, wherever that can be done here.
KINDS = {
    "no CUDA": (_no_cuda, 2, "model.device=auto"),
    "no driver": (lambda _: RuntimeError("Found no NVIDIA driver on your system."), 2, "nvidia-smi"),
    "no such GPU": (lambda _: _torch("CUDA error: invalid device ordinal", "AcceleratorError"), 2, "nvidia-smi"),
    "GPU failed": (lambda _: _torch("CUDA error: an illegal memory access", "AcceleratorError"), 5, "resumes"),
    "GPU memory": (lambda _: _torch("CUDA out of memory. Tried to allocate 1 GiB"), 5, "model.kv_cache_bytes"),
    "host memory": (lambda _: _of(lambda: bytearray(1 << 62)), 5, "model.kv_cache_bytes"),
    "host memory, torch": (lambda _: _of(lambda: __import__("torch").empty(1 << 58)), 5, "model.kv_cache_bytes"),
    "gated": (lambda _: _hub("GatedRepoError"), 2, "hf auth login"),
    "no such repository": (lambda _: _hub("RepositoryNotFoundError"), 2, "model.revision"),
    "offline": (lambda _: _hub("OfflineModeIsEnabled"), 2, "hf download"),
    "hub": (lambda _: _hub("HfHubHTTPError"), 5, "hf download"),
    "terminal": (lambda _: _of("é".encode, "ascii"), 2, "PYTHONUTF8"),
    "refused": (lambda _: ConnectionRefusedError(111, "Connection refused"), 5, "resumes"),
    "timeout": (lambda _: TimeoutError("timed out"), 5, "resumes"),
    "Ray": (lambda _: _ray("RaySystemError"), 5, "ray status"),
    "no such file": (lambda tmp: _of(open, tmp / "nowhere"), 2, "check the path"),
    "a folder": (lambda tmp: _of(open, tmp), 2, "check the path"),
    "not a folder": (lambda tmp: _of(open, "/dev/null/x"), 2, "check the path"),
    "name too long": (lambda tmp: _of(open, tmp / ("x" * 300)), 2, "check the path"),
    "no permission": (lambda _: PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "permissions"),
    "read only": (lambda _: OSError(errno.EROFS, "Read-only file system", "/x"), 2, "permissions"),
    "disk full": (lambda _: OSError(errno.ENOSPC, "No space left on device", "/x"), 5, "TMPDIR"),
    "open files": (lambda _: OSError(errno.EMFILE, "Too many open files"), 5, "ulimit"),
    "disk": (lambda _: OSError(errno.EIO, "Input/output error"), 5, "resumes"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_kind_gets_words_and_is_never_called_a_defect(kind, tmp_path, capsys) -> None:
    make, exit_code, advice = KINDS[kind]
    error = make(tmp_path)

    def command() -> int:
        raise error

    assert guarded(command, debug=False) == exit_code
    said = capsys.readouterr().err
    assert advice in said
    assert "defect" not in said
    assert type(error).__name__ in said


@pytest.mark.parametrize(
    "error",
    [
        KeyError("lease"),
        TypeError("unsupported operand"),
        AssertionError(),
        RuntimeError("dictionary changed size"),
        ValueError("x"),
        OSError("no number"),
        ImportError("cannot import name 'gone' from 'pipeline.execution.rows'", name="pipeline.execution.rows"),
        ModuleNotFoundError("No module named 'illava.gone'", name="illava.gone"),
    ],
    ids=repr,
)
def test_an_unknown_kind_stays_a_defect(error, capsys) -> None:
    def command() -> int:
        raise error

    assert guarded(command, debug=False) == 5
    assert "this is a defect" in capsys.readouterr().err


# What a user's file can lead a library into, and this program's own mistake as well: whoever reads the file says so.
BY_OUR_OWN_MISTAKE = {
    "our report template": lambda: render_html("page.html.jinja", title="a value is missing"),
    "a template": lambda: jinja2.Template("{% if %}"),
    "json": lambda: json.loads("{"),
    "yaml": lambda: yaml.safe_dump(object()),
    "csv": lambda: csv.writer(io.StringIO(), quoting=csv.QUOTE_NONE).writerow(["a,b"]),
    "bytes": b"\xe9".decode,
    "arrow": lambda: pc.equal(pa.array([["x"]]), "x"),
    "an arrow type": lambda: pa.array(["x"], pa.int64()),
    "a picture": lambda: Image.open(io.BytesIO(b"no picture")),
    "weights": lambda: safe_open(__file__, "pt"),
}


@pytest.mark.parametrize("kind", BY_OUR_OWN_MISTAKE)
def test_a_library_s_error_is_not_told_as_a_user_s_file_by_its_class_alone(kind, capsys) -> None:
    assert guarded(BY_OUR_OWN_MISTAKE[kind], debug=False) == 5
    assert "this is a defect" in capsys.readouterr().err


def test_every_class_in_the_table_exists_under_its_name() -> None:
    """A library that renames an error would take it out of the table in silence."""
    import ray.exceptions
    import torch

    assert ray.exceptions, torch
    lacking = []
    optional = {"aiobotocore", "aiohttp", "requests", "httpx", "httpx2", "httpcore", "urllib3", "botocore"}
    for entry in known_errors._TABLE:
        for name in entry.classes:
            module, _, kind = name.rpartition(".")
            if module.split(".")[0] in optional:
                continue
            found = import_module(module)
            one = getattr(found, kind, None) if kind else Exception
            if one is None or (kind and f"{one.__module__}.{one.__qualname__}" != name):
                lacking.append(name)
    assert lacking == []

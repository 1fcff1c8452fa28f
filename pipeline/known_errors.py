"""Exceptions of Python and of libraries that a user's machine, files or settings can cause, in words: one table.

What is not in the table is a defect of this program, and is called one. Classes are told by name, so that no library is
imported to know its errors. Errors of the project itself (`PipelineError`, `ILLaVAError`) carry their own words.

A class that this program can raise by a mistake of its own (of jinja2, json, yaml, csv, pyarrow, Pillow, safetensors;
`KeyError`, `UnicodeDecodeError`) is not in the table: whoever reads a user's file raises an error of the project there.
"""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from pipeline.missing_packages import missing_package

USAGE, INFRASTRUCTURE = 2, 5


class Known(NamedTuple):
    """What is said of an error, and the exit code."""

    words: str
    exit_code: int


class _Entry(NamedTuple):
    """One kind of error.

    Attributes:
        classes: names, ``module.Class`` or a module with a dot behind it, any of which the error or a base may have.
        advice: what to do, said behind the error's own words.
        exit_code: 2 where the same command would end so again, 5 where another time may be better.
        says: what its message must have in it, as a pattern; for classes that say many things.
        codes: of an OSError, one of which it must have.
    """

    classes: tuple[str, ...]
    advice: str
    exit_code: int
    says: str = ""
    codes: tuple[int, ...] = ()


_OS = ("builtins.OSError",)
_TORCH = ("builtins.RuntimeError", "builtins.AssertionError")
_TABLE: tuple[_Entry, ...] = (
    # The device. Classes that say many things: only what is known of them.
    _Entry(
        (*_TORCH, "torch.AcceleratorError"),
        "there is no such CUDA device for this process; `nvidia-smi` and CUDA_VISIBLE_DEVICES say what there is, and "
        "--set model.device=auto --set runtime.gpus_per_actor=auto takes it",
        USAGE,
        says=r"not compiled with CUDA|No CUDA GPUs are available|Found no NVIDIA driver|invalid device ordinal|driver "
        r"version is insufficient|driver on your system is too old|no kernel image is available",
    ),
    _Entry(
        ("builtins.MemoryError", "torch.OutOfMemoryError"),
        "no memory was left on the device or the machine: lower model.kv_cache_bytes, model.max_batch_requests or "
        "runtime.max_inflight_bytes, set model.dtype=bfloat16, or see who else uses it (`nvidia-smi`, `free -h`)",
        INFRASTRUCTURE,
    ),
    _Entry(
        ("builtins.RuntimeError",),
        "no memory was left on the device or the machine: lower model.kv_cache_bytes or model.max_batch_requests, or "
        "see who else uses it (`nvidia-smi`, `free -h`)",
        INFRASTRUCTURE,
        says=r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED",
    ),
    _Entry(
        ("torch.AcceleratorError", "builtins.RuntimeError"),
        "the GPU or its driver failed: `nvidia-smi` and `dmesg` may say why; the same command resumes",
        INFRASTRUCTURE,
        says=r"CUDA error|CUDNN_STATUS|CUBLAS_STATUS|NCCL",
    ),
    # The model hub and model folders.
    _Entry(
        ("huggingface_hub.errors.GatedRepoError",),
        "the model is gated: accept its licence on its page, then set HF_TOKEN or run `hf auth login`",
        USAGE,
    ),
    _Entry(
        (
            *(f"huggingface_hub.errors.{kind}NotFoundError" for kind in ("Repository", "Revision", "Entry")),
            "huggingface_hub.errors.HFValidationError",
            "huggingface_hub.errors.OfflineModeIsEnabled",
            "huggingface_hub.errors.LocalEntryNotFoundError",
        ),
        "check model.model_id and model.revision, or download the model first: hf download MODEL --revision REVISION",
        USAGE,
    ),
    _Entry(
        ("huggingface_hub.errors.",),
        "the model hub did not answer as it should; try again later, or download the model first: hf download MODEL",
        INFRASTRUCTURE,
    ),
    # Text that only a user's terminal, names or files bring.
    _Entry(
        ("builtins.UnicodeEncodeError",),
        "this terminal or file cannot hold such characters: set PYTHONUTF8=1, and give names in UTF-8",
        USAGE,
    ),
    # Networks and stores.
    _Entry(
        ("botocore.exceptions.", "aiobotocore.", "aiohttp.", "requests.", "httpx.", "httpx2.", "httpcore.", "urllib3."),
        "a server could not be reached or refused; check the address and the credentials, then try again",
        INFRASTRUCTURE,
    ),
    _Entry(
        ("builtins.ConnectionError", "builtins.TimeoutError", "socket.gaierror"),
        "a server or another process did not answer; the same command resumes",
        INFRASTRUCTURE,
    ),
    _Entry(
        ("ray.exceptions.AuthenticationError",),
        "the Ray cluster asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH as on its head",
        USAGE,
    ),
    _Entry(
        ("ray.exceptions.",),
        "Ray failed: `ray status` says whether the cluster stands; the same command resumes, and "
        "--set runtime.executor=local runs without Ray",
        INFRASTRUCTURE,
    ),
    # The file system; last, since many libraries derive from OSError.
    _Entry(
        _OS,
        "no space is left there: free some, or move runtime.cache_dir, TMPDIR or output.uri; the same command resumes",
        INFRASTRUCTURE,
        codes=(errno.ENOSPC, errno.EDQUOT),
    ),
    _Entry(
        _OS,
        "too many files are open: raise the limit (`ulimit -n 65536`); the same command resumes",
        INFRASTRUCTURE,
        codes=(errno.EMFILE, errno.ENFILE),
    ),
    _Entry(
        _OS,
        "no process can be started or no memory be had: see who uses the machine, then try again",
        INFRASTRUCTURE,
        codes=(errno.ENOMEM, errno.EAGAIN),
    ),
    _Entry(
        _OS,
        "this user may not do that there: change the permissions, or name another place",
        USAGE,
        codes=(errno.EACCES, errno.EPERM, errno.EROFS),
    ),
    _Entry(
        _OS,
        "there is no such place: check the path; relative ones begin at the working directory",
        USAGE,
        codes=(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EXDEV),
    ),
    _Entry(
        _OS,
        "the disk or the network file system failed; the same command resumes",
        INFRASTRUCTURE,
        codes=(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENXIO, errno.ENODEV, errno.EBUSY, errno.EPIPE),
    ),
)


def known_error(error: BaseException) -> Known | None:
    """The words and the exit code of an error that is no defect of this program; None where nothing is known of it."""
    if isinstance(error, ImportError):
        words = missing_package(error)
        return Known(words, USAGE) if words else None
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
    for entry in _TABLE:
        if _is_one(entry, error, names):
            return Known(f"{type(error).__name__}: {_text(error)}; {entry.advice}", entry.exit_code)
    return None


def _names(kind: str, name: str) -> bool:
    return name.startswith(kind) if kind.endswith(".") else name == kind


def _is_one(entry: _Entry, error: BaseException, names: list[str]) -> bool:
    of_class = any(_names(kind, name) for name in names for kind in entry.classes)
    if not of_class or (entry.codes and getattr(error, "errno", None) not in entry.codes):
        return False
    return not entry.says or re.search(entry.says, str(error)) is not None


def _text(error: BaseException) -> str:
    """The error's own words in one line, the folder being said where it is a file's."""
    text = " ".join(str(error).split())
    name = getattr(error, "filename", None)
    if isinstance(name, str) and name and not os.path.isabs(name):
        text += f" (in {os.getcwd()})"
    return text[:600] or "no reason given"

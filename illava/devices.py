"""Turns a device name into a device, or says why there is no such device, before anything of a model is loaded.

What the processor multiplies natively is read from its features, without torch.
"""

from __future__ import annotations

import difflib
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from illava.errors import DeviceError

if TYPE_CHECKING:
    import torch

_MEANT = {"gpu": "cuda", "nvidia": "cuda", "none": "auto"}
_CPUINFO = "/proc/cpuinfo"
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_NATIVE_BFLOAT16 = "ILLAVA_NATIVE_BFLOAT16"
_NAME = re.compile(r"(cpu|cuda)(?::(\d+))?")


@lru_cache(maxsize=1)
def has_native_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 natively (AVX-512 BF16, AMX), by its features.

    ``ILLAVA_NATIVE_BFLOAT16`` says it instead, as 0 or 1: for a driver beside whose processor the workers' differ.

    Raises:
        DeviceError: the variable is neither 0 nor 1.
    """
    said = os.environ.get(_NATIVE_BFLOAT16)
    if said is not None:
        if said not in ("0", "1"):
            raise DeviceError(f"{_NATIVE_BFLOAT16}={said!r} is neither 0 nor 1; unset it to go by the processor")
        return said == "1"
    try:
        lines = Path(_CPUINFO).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        return False
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return not _BFLOAT16_FLAGS.isdisjoint(flags.split())


def cpu_dtype() -> Literal["bfloat16", "float32"]:
    """The dtype that ``auto`` takes on CPU: bfloat16 where the processor multiplies it natively, else float32."""
    return "bfloat16" if has_native_bfloat16() else "float32"


def has_cuda() -> bool:
    """Whether torch can use a CUDA device in this process."""
    import torch

    return torch.cuda.is_available()


def cuda_memory_bytes() -> int:
    """Memory of this process's first CUDA device in all."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def open_device(name: str | int | torch.device) -> torch.device:
    """The device of that name; ``auto`` is CUDA where there is one, else the CPU; a number N is ``cuda:N``.

    Raises:
        DeviceError: no such device is known, or this process has none.
    """
    import torch

    if name == "auto":
        name = "cuda" if has_cuda() else "cpu"
    if isinstance(name, int) and not isinstance(name, bool) and name >= 0:
        name = f"cuda:{name}"
    found = _NAME.fullmatch(str(name))
    if found is None:
        near = _MEANT.get(str(name).lower()) or next(
            iter(difflib.get_close_matches(str(name).lower(), ("auto", "cpu", "cuda"), 1)), None
        )
        hint = f"; did you mean {near!r}?" if near else ""
        raise DeviceError(f"device {str(name)!r} is none of auto, cpu, cuda, cuda:N{hint}")
    kind, index = found.groups()
    if kind == "cpu" and index not in {None, "0"}:
        raise DeviceError(f"device {str(name)!r}: there is one CPU device, cpu; threads are torch.set_num_threads")
    if kind == "cuda":
        _require_cuda(int(index or 0))
    return torch.device(str(name))


def _require_cuda(index: int) -> None:
    import torch

    if not torch.backends.cuda.is_built():
        raise DeviceError(
            f"device cuda: torch {torch.__version__} here is built without CUDA; install a CUDA build of torch "
            "(https://pytorch.org/get-started/locally), or take the device cpu"
        )
    if not has_cuda():
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "`nvidia-smi` should list one, with a driver new enough for CUDA " + str(torch.version.cuda)
        if shown is not None:
            why = f"CUDA_VISIBLE_DEVICES is {shown!r}; " + why
        raise DeviceError(f"device cuda: this process sees no CUDA device ({why}); or take the device cpu")
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError(
            f"device cuda:{index}: this process sees {count} CUDA device{'s' * (count > 1)}, cuda:0"
            + f" to cuda:{count - 1}" * (count > 1)
        )

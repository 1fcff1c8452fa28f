"""Describes the machine and the versions a benchmark ran on, and writes its JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from illava.devices import has_native_bfloat16


def describe_machine() -> dict[str, Any]:
    """CPU, GPU, memory, commit and package versions: what a reader needs to place a figure."""
    import torch

    return {
        "cpu": _cpu_name(),
        "native_bfloat16": has_native_bfloat16(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "commit": _commit(),
        **{name: _version(name) for name in ("torch", "transformers", "ray", "pyarrow", "illava")},
    }


def require_native_products(dtype: str, device: str = "cpu") -> None:
    """End the script where bfloat16 on CPU would say nothing: the processor has no native products of it."""
    if dtype == "bfloat16" and device == "cpu" and not has_native_bfloat16():
        raise SystemExit(
            f"bfloat16 cannot be shown here: {_cpu_name()} has no native bfloat16 products (none of the features "
            "avx512_bf16 and amx_bf16 in /proc/cpuinfo). Run it on a processor that has, or pass --dtype float32"
        )


def write_json(path: str | Path, result: dict[str, Any]) -> None:
    """Write one benchmark's result, with the machine, in a form that diffs well."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"machine": describe_machine(), **result}, indent=2) + "\n")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """What ``ILLAVA_COMMIT`` says, for a tree that travels without ``.git``; else what git says, if it is there."""
    if given := os.environ.get("ILLAVA_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:  # a GPU machine may have no git
        return None
    return found.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

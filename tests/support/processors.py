"""A processor with, or without, native products of bfloat16, as the code under test sees it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from illava import devices

FLAGS = {True: "fpu avx512f avx512_bf16 sse2", False: "fpu avx512f avx512_bf16x sse2"}


def pretend_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, native_bfloat16: bool) -> None:
    """Let /proc/cpuinfo have these features, and nothing else say what the processor can do."""
    path = tmp_path / f"cpuinfo_{native_bfloat16}"
    flags = FLAGS[native_bfloat16]
    path.write_text(f"processor\t: 0\nmodel name\t: avx512_bf16 in a name\nflags\t\t: {flags}\nbugs\t\t: amx_bf16\n")
    if "ILLAVA_NATIVE_BFLOAT16" in os.environ:
        monkeypatch.delenv("ILLAVA_NATIVE_BFLOAT16")
    monkeypatch.setattr(devices, "_CPUINFO", str(path))
    devices.has_native_bfloat16.cache_clear()

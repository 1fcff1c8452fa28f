"""Chooses the kernels of a device: our own in Triton, or their reference implementations in torch.

The choice is made once a device. ``ILLAVA_KERNELS`` overrides it: ``triton`` demands the kernels, and is refused where
they cannot run; ``torch`` forces the reference implementations. Only the files in this folder import triton, and only
on a device where it is used.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch

from illava.errors import ModelLoadError

Kernels = Literal["triton", "torch"]
_CAPABILITY = (8, 0)


@lru_cache(maxsize=32)
def kernels_on(device: torch.device) -> Kernels:
    """``triton`` on CUDA of compute capability 8.0 or more where triton can be imported; else ``torch``.

    Raises:
        ModelLoadError: ``ILLAVA_KERNELS`` is no known word, or demands what cannot run there.
    """
    wanted = os.environ.get("ILLAVA_KERNELS", "auto")
    if wanted not in ("auto", "triton", "torch"):
        raise ModelLoadError(f"ILLAVA_KERNELS={wanted!r} is not one of auto, triton, torch")
    if wanted == "torch":
        return "torch"
    obstacle = _obstacle(device)
    if obstacle is None:
        return "triton"
    if wanted == "triton":
        raise ModelLoadError(f"ILLAVA_KERNELS=triton, but {obstacle}; unset it, or set it to auto or torch")
    return "torch"


def _obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run there."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type == "cpu":
        asked = os.environ.get("ILLAVA_KERNELS") == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if asked else "on CPU they run under Triton's interpreter only (TRITON_INTERPRET=1), for tests"
    if device.type != "cuda":
        return f"there are none for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= _CAPABILITY else f"{device} has compute capability {capability}, below {_CAPABILITY}"

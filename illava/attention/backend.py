"""Chooses the kernels of a device: our own in Triton or their references in torch, and what packed attention runs on.

``ILLAVA_KERNELS`` overrides the choice of kernels, which is made once a device: ``triton`` demands them, ``torch``
forces the reference implementations. ``ILLAVA_ATTENTION`` overrides the backend of packed attention. What is demanded
where it cannot run is refused in words. Only the files in this folder import triton, and only on a device where it is
used.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from illava.errors import ModelLoadError

Kernels = Literal["triton", "torch"]
AttentionBackend = Literal["varlen", "cudnn", "sdpa", "math"]
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


def backend_name(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> AttentionBackend:
    """The backend of packed attention there, by ``ILLAVA_ATTENTION`` if it is set.

    - ``varlen``: torch's packed FlashAttention, for segments of any lengths in one call; taken by itself where it can
      run.
    - ``cudnn``: SDPA on cuDNN where all segments are of one length, as the frames of a video or a prompt alone are;
      the packed FlashAttention for the others. Never taken by itself.
    - ``sdpa``: what torch's SDPA chooses, segment by segment; where ``varlen`` cannot run.
    - ``math``: SDPA's plain formula, which forms whole maps; to find out whether a kernel is at fault.

    Raises:
        ModelLoadError: ``ILLAVA_ATTENTION`` is no known word, or demands what cannot run there.
    """
    wanted = os.environ.get("ILLAVA_ATTENTION", "auto")
    if wanted in ("sdpa", "math"):
        return "sdpa" if wanted == "sdpa" else "math"
    if wanted not in ("auto", *get_args(AttentionBackend)):
        words = ", ".join(("auto", *get_args(AttentionBackend)))
        raise ModelLoadError(f"ILLAVA_ATTENTION={wanted!r} is not one of {words}")
    obstacle = _varlen_obstacle(device, dtype, head_dim)
    if obstacle is not None:
        if wanted == "auto":
            return "sdpa"
        raise ModelLoadError(f"ILLAVA_ATTENTION={wanted}, but {obstacle}; unset it, or set it to auto, sdpa or math")
    return "cudnn" if wanted == "cudnn" else "varlen"


def _varlen_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the packed FlashAttention cannot run there."""
    if device.type != "cuda":
        return f"there is no FlashAttention for {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"FlashAttention takes head widths that are multiples of 8 up to 256, not {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= _CAPABILITY else f"{device} has compute capability {capability}, below {_CAPABILITY}"


@lru_cache(maxsize=16)
def check_cudnn(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Refuse cuDNN where it does not serve heads of this width; found by one tiny call.

    Raises:
        ModelLoadError: with what SDPA said.
    """
    probe = torch.zeros(1, 2, 64, head_dim, device=device, dtype=dtype)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(probe, probe, probe)
    except RuntimeError as error:
        raise ModelLoadError(
            f"ILLAVA_ATTENTION=cudnn, but cuDNN's attention does not serve {dtype} heads of width {head_dim} on "
            f"{device}: {error}; unset it, or set it to auto"
        ) from error

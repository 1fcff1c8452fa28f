"""Brings numbers from the host to a device without waiting for what the device still has to do.

A plain copy to CUDA (`torch.tensor(numbers, device=...)`, `x.to(device)`, an index that is a list) waits until all work
queued before it is done, so that nothing is queued behind. Torch is loaded on use: reducers import this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

_CACHED = 512


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, from pinned memory and in the order of the device's work; elsewhere as ``to`` does."""
    if device.type != "cuda" or value.is_cuda:
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def array_on(array: np.ndarray, device: torch.device) -> Tensor:
    """The same of an array that nobody writes to through the tensor; Ray's are read-only, of which torch would warn."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return to_device(torch.from_numpy(array), device)


def on_device(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Put numbers that change from call to call into a tensor there."""
    import torch

    return to_device(torch.tensor(numbers, dtype=dtype), device)


def constant_on(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The same for counts that come again with the next input of its shape: a tensor that is kept and never written.

    Without a dtype it is float32 where a number is a float, else int64. Numbers of one value and two types are one key.
    """
    import torch

    if dtype is None:
        dtype = torch.float32 if any(isinstance(number, float) for number in numbers) else torch.long
    return _constant(tuple(numbers), device, dtype)


@lru_cache(maxsize=_CACHED)
def _constant(numbers: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    import torch

    with torch.inference_mode(False):  # training may save for backward what inference cached
        return to_device(torch.tensor(numbers, dtype=dtype), device)

"""Brings numbers from the host to a device without waiting for what the device still has to do.

A plain copy to CUDA (`torch.tensor(numbers, device=...)`, `x.to(device)`, an index that is a list) waits until all work
queued before it is done, so that nothing is queued behind. Work that is captured copies nothing: see `FixedCopies`.
Torch is loaded on use: reducers import this module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

_CACHED = 512
_P = ParamSpec("_P")
_T = TypeVar("_T")


class NotFixedError(RuntimeError):
    """Work that should copy the same numbers to the device in every run copied others."""


class FixedCopies:
    """Gives every run of the same work the device tensors of its first run, which it keeps.

    So a captured run holds no copy from the host, and what it reads lives as long as this. Each number must be the one
    of the first run.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._next: int | None = None  # None in the first run

    @contextmanager
    def run(self) -> Iterator[None]:
        """Hold one run.

        Raises:
            NotFixedError: it copied other numbers, or fewer.
        """
        first = not self._copies
        self._next = None if first else 0
        token = _fixed.set(self)
        try:
            yield
        finally:
            _fixed.reset(token)
        if not first and self._next != len(self._copies):
            raise NotFixedError(f"{self._next} copies to the device, {len(self._copies)} in the first run")

    def copy(self, value: Tensor, device: torch.device) -> Tensor:
        """The copy of this run's next tensor."""
        if self._next is None:
            there = _to_device(value, device)
            self._copies.append((value.clone(), there))
            return there
        if self._next >= len(self._copies):
            raise NotFixedError(f"more than the {len(self._copies)} copies to the device of the first run")
        host, there = self._copies[self._next]
        self._next += 1
        mine, theirs = value.numpy(), host.numpy()
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape or (mine != theirs).any():
            raise NotFixedError(f"copy {self._next} to the device is not that of the first run")
        return there


_fixed: ContextVar[FixedCopies | None] = ContextVar("fixed", default=None)


def device_cache(maxsize: int) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Cache a function whose tensors lie on a device and are never written; under `FixedCopies` those keep them."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        cached: Any = lru_cache(maxsize)(function)

        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            return cached(*args, **kwargs) if _fixed.get() is None else function(*args, **kwargs)  # type: ignore[no-any-return]

        call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        return call

    return decorate


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, from pinned memory and in the order of the device's work; elsewhere as ``to`` does."""
    fixed = _fixed.get()
    if fixed is not None and value.device.type == "cpu":
        return fixed.copy(value, device)
    return _to_device(value, device)


def _to_device(value: Tensor, device: torch.device) -> Tensor:
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


@device_cache(_CACHED)
def _constant(numbers: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    import torch

    with torch.inference_mode(False):  # training may save for backward what inference cached
        return to_device(torch.tensor(numbers, dtype=dtype), device)

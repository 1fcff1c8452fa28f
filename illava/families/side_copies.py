"""Copies pixels to a GPU ahead of their use: on a stream of their own, while the device encodes what came before.

Elsewhere nothing is copied ahead. What is begun and never taken is forgotten with the next call of `SideCopies.begin`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from illava.host_copies import array_on


class PixelCopies(Protocol):
    """Gives pixels on the device."""

    def begin(self, arrays: Iterable[np.ndarray]) -> None: ...

    def take(self, array: np.ndarray) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Begun:
    array: np.ndarray  # held, so that no other array takes its id
    copy: Tensor
    done: torch.cuda.Event


class SideCopies:
    """Holds the copies of one device that were begun and not taken yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._begun: dict[int, _Begun] = {}

    def begin(self, arrays: Iterable[np.ndarray]) -> None:
        """Begin to copy these arrays from pinned memory; the host waits for its own memory alone."""
        if self._device.type != "cuda":
            return
        wanted = {id(array): array for array in arrays}
        self._begun = {key: begun for key, begun in self._begun.items() if key in wanted}
        stream = self._stream = self._stream or torch.cuda.Stream(self._device)
        for key, array in wanted.items():
            if key not in self._begun:
                with torch.cuda.stream(stream):
                    copy = array_on(array, self._device)
                self._begun[key] = _Begun(array, copy, stream.record_event())

    def take(self, array: np.ndarray) -> Tensor:
        """The array on the device; the device's work from here on waits for a copy that was begun."""
        begun = self._begun.pop(id(array), None)
        if begun is None:
            return array_on(array, self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(begun.done)
        begun.copy.record_stream(current)  # its memory, of the other stream's pool, is in use here
        return begun.copy

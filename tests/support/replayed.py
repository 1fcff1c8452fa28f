"""Captures work on a CPU as a CUDA graph does: its operations, on the tensors they had, to be run again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS_BACK = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "is_nonzero", "equal"}


class CpuCapture(TorchDispatchMode):
    """Captures a run as `illava.families.tower_graphs.CudaCapture` does.

    A replay runs each operation on the very tensors it had, and puts what it gives where it lay. Random numbers, host
    values and Python are those of the capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in READS_BACK:
            raise RuntimeError(f"a captured run reads the device: {func._opname}")
        result = func(*args, **(kwargs or {}))
        self.recorded.append((func, args, kwargs or {}, tensors_of(result)))
        return result

    def __call__(self, run: Any) -> Any:
        run()
        run()
        recorder = CpuCapture()
        with recorder:
            encoded = run()
        return recorder.replay, encoded

    def replay(self) -> None:
        for func, args, kwargs, before in self.recorded:
            for old, new in zip(before, tensors_of(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # else a view, or in place
                    assert old.shape == new.shape, f"{func} gave another shape"
                    old.copy_(new)


def tensors_of(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple | list) else [result]
    return [part for part in parts if isinstance(part, torch.Tensor)]

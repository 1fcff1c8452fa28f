"""Reads what a model folder's safetensors files hold, from their headers: names, dtypes and counts. Torch-free.

Weights that are missing, broken off, quantised or an adapter's are refused here, before a device is asked for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from illava.checkpoint_check import check_stored
from illava.errors import ModelLoadError
from illava.model_files import is_hub_snapshot

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound


def num_stored_values(folder: Path) -> int | None:
    """Count the numbers that a model folder's weight files hold; None where a hub model's are not downloaded yet.

    Raises:
        ModelLoadError: a file is missing or broken off, or `check_stored` refuses what the files hold.
    """
    paths = _weight_files(folder)
    if paths is None:
        return None
    tensors: dict[str, Any] = {}
    for path in paths:
        tensors |= _header(path)
    check_stored(str(folder), {name: str(tensor["dtype"]) for name, tensor in tensors.items()})
    return sum(math.prod(tensor["shape"]) for tensor in tensors.values())


def _weight_files(folder: Path) -> list[Path] | None:
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    is_snapshot = is_hub_snapshot(folder)  # where weights come when they are needed
    index = folder / _INDEX
    if not index.is_file():
        if is_snapshot:
            return None
        others = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt"))
        instead = f"; {', '.join(others[:3])} cannot be read: only safetensors are" if others else ""
        raise ModelLoadError(
            f"{folder} has no weights: neither {_WHOLE} nor {_INDEX} is there{instead}. Download the model again: "
            f"hf download MODEL --local-dir {folder}"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} names no weight files ({error}); download the model again") from error
    paths = [folder / name for name in names]
    lacking = [path.name for path in paths if not path.is_file()]
    if lacking and is_snapshot:
        return None
    if lacking:
        raise ModelLoadError(
            f"{folder} lacks {len(lacking)} of the {len(paths)} weight files that {_INDEX} names, e.g. {lacking[0]}; "
            f"download the model again: hf download MODEL --local-dir {folder}"
        )
    return paths


def _header(path: Path) -> Mapping[str, Any]:
    """The tensors of one file: name -> dtype, shape, offsets. Format: github.com/huggingface/safetensors."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size):
                raise ValueError("no header")
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{path} is no safetensors file ({error}); download the model again") from error
    if end > size:
        raise ModelLoadError(f"{path} is broken off: {size:,} of {end:,} bytes are there; download the model again")
    return tensors

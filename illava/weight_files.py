"""Reads what a model folder's safetensors files hold, from their headers, and counts what that takes in memory.

Weights that are missing, broken off, an adapter's or quantised in a way that is not read are refused here, before a
device is asked for them. Torch-free.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from illava.checkpoint_check import StoredScheme, check_stored, is_quantised
from illava.errors import ModelLoadError
from illava.model_files import is_hub_snapshot

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound


Quantization = Literal["none", "float8", "int8", "int4"]  # of the decoder's linear layers, while a model is loaded
INT4_GROUP = 128  # inputs of a layer that share a scale and a zero in int4
_LAYER = re.compile(
    r"(^|\.)layers\.\d+\.(.+\.)?(\w+_proj|in_proj_(qkvz?|z))\.weight$"
)  # of gates, a few rows each, none
_ELSEWHERE = re.compile(r"vision|visual|\.experts\.")


def is_quantised_on_load(name: str) -> bool:
    """Whether ``model.quantization`` concerns the weight of this name: a linear layer of the decoder's own."""
    return _LAYER.search(name) is not None and _ELSEWHERE.search(name) is None


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a mixture of experts, whose weights are no linear layers."""
    text = config.get("text_config") or config
    return bool(text.get("num_experts") or text.get("num_local_experts"))


def check_options(
    model_id: str,
    config: Mapping[str, Any],
    *,
    scheme: StoredScheme | None,
    quantization: Quantization,
    has_adapter: bool,
) -> None:
    """Refuse to change weights that are stored quantised or are no linear layers, and a scheme that is none.

    Raises:
        ModelLoadError: names the option.
    """
    if quantization not in get_args(Quantization):
        raise ModelLoadError(f"quantization {quantization!r} is not one of {', '.join(get_args(Quantization))}")
    if quantization != "none" and has_experts(config):
        raise ModelLoadError(
            f"{model_id!r} is a mixture of experts, most of whose weights model.quantization would leave as they are: "
            "set it to none"
        )
    if scheme is not None and (quantization != "none" or has_adapter):
        what = "model.adapter" if has_adapter else f"model.quantization {quantization}"
        raise ModelLoadError(
            f"{model_id!r} is stored in {scheme}: {what} wants the unquantised checkpoint; take that one, with "
            "model.quantization where memory is short"
        )


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """Counts the numbers of a model's weights.

    Attributes:
        linear_values: of the decoder's linear layers, which `Quantization` concerns.
        linear_rows: their output channels.
        other_values: of everything else.
        stored_bytes: of the files.
    """

    linear_values: int
    linear_rows: int
    other_values: int
    stored_bytes: int = 0

    def num_bytes(self, itemsize: int, quantization: Quantization = "none") -> int:
        """Memory of the weights in a dtype of so many bytes, scales included."""
        linear = {
            "none": self.linear_values * itemsize,
            "float8": self.linear_values + 4 * self.linear_rows,
            "int8": self.linear_values + itemsize * self.linear_rows,
            "int4": self.linear_values // 2 + 4 * self.linear_values // INT4_GROUP,  # bfloat16 scale and zero a group
        }[quantization]
        return linear + self.other_values * itemsize


def count_stored(folder: Path, scheme: StoredScheme | None = None) -> WeightCounts | None:
    """Count the numbers that a model folder's weight files stand for; None where a hub model's are not here yet.

    Raises:
        ModelLoadError: a file is missing or broken off, or `check_stored` refuses what the files hold.
    """
    paths = _weight_files(folder)
    if paths is None:
        return None
    tensors: dict[str, Any] = {}
    for path in paths:
        tensors |= _header(path)
    check_stored(str(folder), {name: str(tensor["dtype"]) for name, tensor in tensors.items()}, scheme)
    linear = rows = other = 0
    for stored_name, tensor in tensors.items():
        name, values = stored_name, math.prod(tensor["shape"])
        if scheme is not None and stored_name.endswith(".weight_packed"):
            name = stored_name.removesuffix("_packed")
            values = values * 32 // int(scheme.weights.removeprefix("int"))
        if is_quantised(name):
            continue  # scales
        if is_quantised_on_load(name):
            linear, rows = linear + values, rows + tensor["shape"][0]
        else:
            other += values
    stored = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in tensors.values())
    return WeightCounts(linear, rows, other, stored)


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

"""`EngineConfig`: what one engine may hold and do at a time. Loads neither torch nor a model."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any

_OF_TRANSFORMERS = {
    "torch_dtype": "give dtype='bfloat16'",
    "device_map": "give device='cuda:0'; a model lies on one device",
    "attn_implementation": "the attention is chosen by the device, and `VLM.backends` says which it is; leave it out",
    "trust_remote_code": "code that comes with a model is never run; leave it out",
}
# Where max_batch_requests is None. On a GPU a decode step of so many rows computes longer than it reads weights (an
# H200: 790 TFLOP/s over 4.8 TB/s are 165 rows in half precision), so more rows gain nothing. A CPU's are fewer by far.
GPU_BATCH_REQUESTS, CPU_BATCH_REQUESTS = 256, 32
_RENAMED = {"page_size": "block_size"}  # old name -> new name; an old name works for one release


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Memory and batch limits of a `VLM` and its engine.

    Attributes:
        kv_cache_bytes: size of the key/value pool, with recurrent states; None takes 2 GiB on CPU, 60 % of the free
            memory on a GPU.
        max_batch_requests: requests encoded or running at a time, as far as the pool holds them; beside them those
            whose media are encoded for these. None is 32 on CPU, 256 on a GPU.
        block_size: tokens of a key/value block.
        max_vision_patches: patches of one tower call, unless a single request has more.
        max_prefill_tokens: prompt tokens of one prefill, unless a single request has more.
        max_chunk_tokens: prompt tokens of one step while others decode; a longer prefill goes on in the next step.
        gpu_share: share of the GPU's memory that this engine may fill, as where several processes share one.
        decode_graphs: decode steps as CUDA graphs; None where they can be, True refuses where they cannot.
        tower_graphs: encodings as CUDA graphs, where the plan fixes their counts; see `illava.families.tower_graphs`.

    Raises:
        ValueError: a limit below 1, under which nothing would ever run.
        TypeError: a limit that is no whole number.
    """

    kv_cache_bytes: int | None = None
    max_batch_requests: int | None = None
    block_size: int = 16
    max_vision_patches: int = 32_768
    max_prefill_tokens: int = 16_384
    max_chunk_tokens: int = 4_096
    gpu_share: float = 1.0
    decode_graphs: bool | None = None
    tower_graphs: bool = False

    def __post_init__(self) -> None:
        for name in (
            "max_batch_requests",
            "block_size",
            "max_vision_patches",
            "max_prefill_tokens",
            "max_chunk_tokens",
        ):
            if name == "max_batch_requests" and self.max_batch_requests is None:
                continue
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} is a whole number; got {getattr(self, name)!r}")
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.kv_cache_bytes is not None and not isinstance(self.kv_cache_bytes, int):
            raise TypeError(f"kv_cache_bytes is a number of bytes, such as 2 << 30; got {self.kv_cache_bytes!r}")
        if not 0 < self.gpu_share <= 1:
            raise ValueError(f"gpu_share must lie in (0, 1]; got {self.gpu_share}")

    def batch_limit(self, device_type: str) -> int:
        """``max_batch_requests``, or its default on such a device."""
        if self.max_batch_requests is not None:
            return self.max_batch_requests
        return GPU_BATCH_REQUESTS if device_type == "cuda" else CPU_BATCH_REQUESTS

    def override(self, **options: Any) -> EngineConfig:
        """Replace some limits, given by name.

        Raises:
            TypeError: a name that is no limit, with the nearest that is; or one limit by its old and its new name.
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name in _OF_TRANSFORMERS:
                raise TypeError(f"unknown option {name!r}, a word of transformers: {_OF_TRANSFORMERS[name]}")
            if name not in known and name not in _RENAMED:
                near = difflib.get_close_matches(name, known, n=1)
                meant = f", did you mean {near[0]!r}?" if near else "."
                raise TypeError(f"unknown engine option {name!r}{meant} The options are {', '.join(known)}")
        return replace(self, **_by_new_names(options))


def _by_new_names(options: dict[str, Any]) -> dict[str, Any]:
    """Warn about every option that is given by its old name, and give it its new one."""
    for old, new in _RENAMED.items():
        if old in options:
            if new in options:
                raise TypeError(f"engine option {new!r} is given twice: {old!r} is its old name; give {new!r} alone")
            warnings.warn(
                f"engine option {old!r} is now called {new!r}; the old name goes with the next release",
                DeprecationWarning,
                stacklevel=4,  # the caller of `VLM` or `VLM.from_pretrained`
            )
    return {_RENAMED.get(name, name): value for name, value in options.items()}

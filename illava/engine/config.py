"""`EngineConfig`: what one engine may hold and do at a time. Loads neither torch nor a model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Memory and batch limits of a `VLM` and its engine.

    Attributes:
        kv_cache_bytes: size of the key/value pool; None takes 2 GiB on CPU, 60 % of the free memory on a GPU.
        max_batch_requests: requests encoded or running at a time; beside them those whose media are encoded for these.
        block_size: tokens of a cache page.
        max_vision_patches: patches of one tower call, unless a single request has more.
        max_prefill_tokens: prompt tokens of one prefill, unless a single request has more.
        max_chunk_tokens: prompt tokens of one step while others decode; a longer prefill goes on in the next step.
        decode_graphs: decode steps as CUDA graphs; None where they can be, True refuses where they cannot.

    Raises:
        ValueError: a limit below 1, under which nothing would ever run.
    """

    kv_cache_bytes: int | None = None
    max_batch_requests: int = 32
    block_size: int = 16
    max_vision_patches: int = 32_768
    max_prefill_tokens: int = 16_384
    max_chunk_tokens: int = 4_096
    decode_graphs: bool | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_batch_requests",
            "block_size",
            "max_vision_patches",
            "max_prefill_tokens",
            "max_chunk_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")

    def override(self, **options: Any) -> EngineConfig:
        """The same with some limits given by name.

        Raises:
            TypeError: a name that is no limit, with the nearest that is.
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                meant = f", did you mean {near[0]!r}?" if near else "."
                raise TypeError(f"unknown engine option {name!r}{meant} The options are {', '.join(known)}")
        return replace(self, **options)

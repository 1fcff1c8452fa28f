"""Joins a loaded model, its cache and its engine in `VLM`, the main class of this package.

The reduction plan is given per call, so a baseline and a reduced run share one set of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from illava.attention.backend import kernels_on
from illava.attention.packed import backend_name
from illava.decoder.cuda_graphs import DecodeGraphs, captures_steps
from illava.decoder.kv_cache import PagedCache
from illava.devices import open_device
from illava.engine.config import EngineConfig
from illava.engine.engine import Engine
from illava.errors import ModelLoadError
from illava.families import load_family
from illava.families.base import Family
from illava.pixel_limits import NO_LIMITS, PixelLimits
from illava.plan import EMPTY_PLAN, ReductionPlan, preset
from illava.requests import Generation, Request

_CPU_CACHE_BYTES = 2 << 30
_FREE_MEMORY_SHARE = 0.6  # of what the weights leave; the rest is for activations of tower and prefill


class VLM:
    """Answers requests by a vision-language model under any plan.

    Args:
        family: the loaded model.
        engine_config: limits of pool, batches and steps.
        options: fields of `EngineConfig` by name, as in ``VLM(family, kv_cache_bytes=1 << 30)``; they take precedence
            over ``engine_config``.

    Attributes:
        family: the loaded model.
        engine: the scheduler.

    Raises:
        TypeError: an option that `EngineConfig` does not have.
        ValueError: a limit below 1.
        ModelLoadError: the pool cannot hold a single token, or decode graphs were demanded where there are none.
    """

    def __init__(self, family: Family, engine_config: EngineConfig | None = None, **options: Any) -> None:
        config, decoder = (engine_config or EngineConfig()).override(**options), family.decoder
        block_bytes = 2 * config.block_size * decoder.num_kv_heads * decoder.head_dim * decoder.dtype.itemsize
        pool_bytes = config.kv_cache_bytes
        if pool_bytes is None:
            pool_bytes = _default_cache_bytes(decoder.device, config.gpu_share)
        num_blocks = pool_bytes // block_bytes
        if num_blocks < decoder.num_layers:
            raise ModelLoadError(
                f"a key/value pool of {pool_bytes} bytes holds {num_blocks} blocks of {block_bytes} bytes; one token "
                f"needs {decoder.num_layers}, a block in each layer: raise kv_cache_bytes, or free memory on the device"
            )
        cache = PagedCache(
            num_layers=decoder.num_layers,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        captured = captures_steps(decoder) if config.decode_graphs is None else config.decode_graphs
        graphs = DecodeGraphs(decoder, family.embed, cache, max_batch=config.max_batch_requests) if captured else None
        self.family = family
        self.engine = Engine(family, cache, config, graphs=graphs)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        engine_config: EngineConfig | None = None,
        pixel_limits: PixelLimits = NO_LIMITS,
        **options: Any,
    ) -> VLM:
        """Load a model from a folder or from the Hugging Face hub.

        Args:
            model_id: folder or hub name.
            revision: commit, tag or branch of the hub.
            dtype: name of a torch dtype; ``auto`` is float32 on CPU and bfloat16 on CUDA.
            device: such as ``cuda:0``; ``auto`` is CUDA where there is one.
            engine_config: see the class.
            pixel_limits: bounds of the pictures' sizes; give `load_preprocessor` the same ones.
            options: see the class.

        Raises:
            TypeError: an option that `EngineConfig` does not have; raised before anything is loaded.
            DeviceError: this process has no such device.
            ModelLoadError: weights, configuration or dtype that cannot be loaded, or no memory left for the cache.
        """
        config, device = (engine_config or EngineConfig()).override(**options), open_device(device)
        family = load_family(
            model_id,
            revision=revision,
            dtype=_resolve_dtype(dtype, device),
            device=device,
            pixel_limits=pixel_limits,
        )
        return cls(family, config)

    def generate(self, requests: Sequence[Request], *, plan: ReductionPlan | str = EMPTY_PLAN) -> list[Generation]:
        """Answer all requests, in their order; a request that fails carries its error and disturbs no other.

        Args:
            requests: with distinct ids.
            plan: a plan or the name of a preset.

        Raises:
            PlanError: the plan makes no sense for this model.
            RequestError: two requests of the same id.
            RuntimeError: requests given to `submit` are still running.
        """
        return self.engine.generate(requests, preset(plan) if isinstance(plan, str) else plan)

    def submit(self, request: Request, *, plan: ReductionPlan | str = EMPTY_PLAN) -> None:
        """Queue a request for `step`. Raises PlanError or RequestError at once if it cannot be answered."""
        self.engine.submit(request, preset(plan) if isinstance(plan, str) else plan)

    def step(self) -> list[Generation]:
        """Run tower, prefill and decode once; returns the generations that ended."""
        return self.engine.step()

    def cancel_all(self) -> list[str]:
        """Drop every request, as after an error raised by `step`; returns the dropped ids."""
        return self.engine.cancel_all()

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    @property
    def device_busy_s(self) -> float:
        """Seconds of all steps so far: the sum of `Timing.device_s` over all generations."""
        return self.engine.device_busy_s

    @property
    def attention_backend(self) -> str:
        """The backend of the decoder's packed attention: ``varlen`` or ``sdpa``."""
        decoder = self.family.decoder
        return backend_name(decoder.device, decoder.dtype, decoder.head_dim)

    @property
    def backends(self) -> dict[str, str]:
        """The choices on this machine: packed attention, kernels of scores and paged decode, and decode steps."""
        return {
            "attention": self.attention_backend,
            "kernels": kernels_on(self.family.decoder.device),
            "decode_steps": "eager" if self.engine.graphs is None else "cuda_graphs",
        }


def _resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelLoadError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")
    return found


def _default_cache_bytes(device: torch.device, gpu_share: float) -> int:
    """The pool's size; of a shared GPU from this process's own share, whatever the other processes hold by now."""
    if device.type != "cuda":
        return _CPU_CACHE_BYTES
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    own_bytes = int(total_bytes * gpu_share) - torch.cuda.memory_reserved(device)
    return int(max(0, min(free_bytes, own_bytes)) * _FREE_MEMORY_SHARE)

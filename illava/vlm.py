"""Joins a loaded model, its cache and its engine in `VLM`, the main class of this package.

The reduction plan is given per call, so a baseline and a reduced run share one set of weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

import torch

from illava.attention.backend import backend_name, kernels_on
from illava.decoder.cuda_graphs import DecodeGraphs, captures_steps
from illava.decoder.hybrid_cache import make_cache
from illava.devices import cpu_dtype, open_device
from illava.engine.config import EngineConfig
from illava.engine.engine import Engine
from illava.engine.sampling import draw_greedy
from illava.errors import ModelLoadError
from illava.families import load_family
from illava.families.adapters import Adapter
from illava.families.base import Family
from illava.families.tower_graphs import CudaCapture, TowerGraphs
from illava.memory_counts import FREE_MEMORY_SHARE
from illava.pixel_limits import NO_LIMITS, PixelLimits
from illava.plan import EMPTY_PLAN
from illava.plan_input.resolve import PlanSource, resolve_plan
from illava.requests import Generation, OnError, Request
from illava.weight_files import Quantization

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_CACHE_BYTES = 2 << 30


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
        ModelLoadError: the pool cannot hold a single token, or decode graphs or an attention backend were demanded
            where there are none.
    """

    def __init__(self, family: Family, engine_config: EngineConfig | None = None, **options: Any) -> None:
        config, decoder = (engine_config or EngineConfig()).override(**options), family.decoder
        pool_bytes = config.kv_cache_bytes
        if pool_bytes is None:
            pool_bytes = _default_cache_bytes(decoder.device, config.gpu_share)
        max_batch = config.batch_limit(decoder.device.type)
        cache = make_cache(decoder, pool_bytes=pool_bytes, block_size=config.block_size, max_requests=max_batch)
        captured = captures_steps(decoder) if config.decode_graphs is None else config.decode_graphs
        backend_name(decoder.device, decoder.dtype, decoder.head_dim)  # refuses a word that cannot be had, at once
        family.tower_graphs = TowerGraphs(family.encoder, CudaCapture(decoder.device)) if config.tower_graphs else None
        graphs = None
        if captured:
            graphs = DecodeGraphs(decoder, family.embed, cache, draw=draw_greedy, max_batch=max_batch)
            with torch.cuda.device_of(cache.k_pool_PSGd), torch.inference_mode():
                graphs.capture()
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
        quantization: Quantization = "none",
        adapter: Adapter | None = None,
        **options: Any,
    ) -> VLM:
        """Load a model from a folder or from the Hugging Face hub.

        Args:
            model_id: folder or hub name.
            revision: commit, tag or branch of the hub.
            dtype: float32, bfloat16 or float16; ``auto`` is bfloat16 on CUDA and on a CPU that multiplies it natively,
                float32 on others.
            device: such as ``cuda:0``; ``auto`` is CUDA where there is one.
            engine_config: see the class.
            pixel_limits: bounds of the pictures' sizes; give `load_preprocessor` the same ones.
            quantization: of the decoder's linear layers, made by torchao while loading: ``none`` (as stored),
                ``float8``, ``int8`` or ``int4``.
            adapter: a LoRA adapter that is added to the model.
            options: see the class.

        Raises:
            TypeError: an option that `EngineConfig` does not have; raised before anything is loaded.
            DeviceError: this process has no such device.
            ModelLoadError: weights, configuration, dtype, quantisation or adapter that cannot be loaded, or no memory
                left for the cache.
        """
        config, device = (engine_config or EngineConfig()).override(**options), open_device(device)
        family = load_family(
            model_id,
            revision=revision,
            dtype=_resolve_dtype(dtype, device),
            device=device,
            pixel_limits=pixel_limits,
            quantization=quantization,
            adapter=adapter,
        )
        return cls(family, config)

    def generate(
        self, requests: Sequence[Request], *, plan: PlanSource = EMPTY_PLAN, errors: OnError = "raise"
    ) -> list[Generation]:
        """Answer all requests, in their order.

        Args:
            requests: with distinct ids.
            plan: a plan, the name of a preset, a dict with the keys of a plan, or the path of a YAML file with them;
                see `illava.plan_input.resolve.resolve_plan`.
            errors: ``raise`` raises the first error of a request, as soon as it is met, and drops the others; with
                ``return`` a request that fails carries its error in `Generation.error`, and disturbs no other.

        Raises:
            PlanError: the plan is none, or makes no sense for this model.
            RequestError: two requests of the same id; or, under ``raise``, a request that this model cannot answer.
            RuntimeError: requests given to `submit` are still running.
            ILLaVAError: under ``raise``, what else ended a request, such as NumericalError; a note names the request.
        """
        if errors not in get_args(OnError):
            raise ValueError(f"errors is 'raise' or 'return', not {errors!r}")
        return self.engine.generate(requests, resolve_plan(plan), errors=errors)

    def submit(self, request: Request, *, plan: PlanSource = EMPTY_PLAN) -> None:
        """Queue a request for `step`. Raises PlanError or RequestError at once if it cannot be answered."""
        self.engine.submit(request, resolve_plan(plan))

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
        """The backend of the decoder's packed attention; see `illava.attention.backend.backend_name`."""
        decoder = self.family.decoder
        return backend_name(decoder.device, decoder.dtype, decoder.head_dim)

    @property
    def backends(self) -> dict[str, str]:
        """The choices on this machine: packed attention, kernels of scores and paged decode, decode steps, weights."""
        return {
            "attention": self.attention_backend,
            "kernels": kernels_on(self.family.decoder.device),
            "decode_steps": "eager" if self.engine.graphs is None else "cuda_graphs",
            "encodings": "eager" if self.family.tower_graphs is None else "cuda_graphs",
            "weights": self.family.weights,
        }


def _resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else _DTYPES[cpu_dtype()]
    name = str(dtype).removeprefix("torch.")
    if name in _DTYPES:
        return _DTYPES[name]
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "f32": "float32"}
    near = difflib.get_close_matches(name.lower(), _DTYPES, n=1, cutoff=0.8)
    meant = short.get(name.lower(), near[0] if near else None)
    hint = f"; did you mean {meant!r}?" if meant else ""
    raise ModelLoadError(f"dtype {dtype!r} is none of auto, {', '.join(_DTYPES)}{hint}")


def _default_cache_bytes(device: torch.device, gpu_share: float) -> int:
    """The pool's size; of a shared GPU from this process's own share, whatever the other processes hold by now."""
    if device.type != "cuda":
        return _CPU_CACHE_BYTES
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    own_bytes = int(total_bytes * gpu_share) - torch.cuda.memory_reserved(device)
    return int(max(0, min(free_bytes, own_bytes)) * FREE_MEMORY_SHARE)

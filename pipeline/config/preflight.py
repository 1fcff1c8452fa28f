"""Finds out, before anything is started or written, whether a job's model can run: plan, weights, device and memory.

Everything is read from JSON files and file headers. Torch is imported only where a GPU is asked for or likely. What a
Ray cluster elsewhere has is not known here.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from illava.engine.config import EngineConfig
from illava.families import load_spec
from illava.families.model_shape import check_plan
from illava.model_files import JsonSection, ModelFiles, require_tokenizer
from illava.weight_files import count_stored
from pipeline.config.placement import place_here
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError

_CPU_CACHE_BYTES = 2 << 30  # `illava.vlm` takes as much where model.kv_cache_bytes is null
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GPU_SIGNS = ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/dxg")

_Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True)
class Preflight:
    """Holds what is known of a job's model before it is loaded.

    Attributes:
        device: ``cpu`` or ``cuda``; None where a cluster elsewhere decides.
        dtype: of the weights in memory.
        weights_bytes: of one actor's weights; None where the hub's files are not downloaded yet.
        cache_bytes: of one actor's key/value pool; None where what the weights leave decides.
        memory_bytes: of the device that holds them; None where it is not known here.
    """

    device: Literal["cpu", "cuda"] | None
    dtype: _Dtype
    weights_bytes: int | None
    cache_bytes: int | None
    memory_bytes: int | None


def preflight(config: JobConfig, dtype: _Dtype) -> Preflight:
    """Check a job's plan, weights, device and memory, as far as this machine can know them.

    Args:
        config: the whole job.
        dtype: of the weights, ``auto`` resolved.

    Raises:
        PlanError: the reduction does not fit the model.
        ModelLoadError: the model's files are missing, broken off, or nothing that can be run.
        ConfigError, DeviceError: a device that is not here, or more memory than it has.
    """
    model = config.model
    check_plan(config.reduction, model.model_id, revision=model.revision)
    _, files = load_spec(model.model_id, revision=model.revision)
    require_tokenizer(files.folder)
    counts = count_stored(files.folder, files.stored_scheme)
    device = _device(config)
    cache_bytes = model.kv_cache_bytes or (_CPU_CACHE_BYTES if device == "cpu" else None)
    if cache_bytes is not None:
        _check_cache(files, cache_bytes, dtype)
    found = Preflight(
        device=device,
        dtype=dtype,
        weights_bytes=None if counts is None else counts.num_bytes(_BYTES[dtype]),
        cache_bytes=cache_bytes,
        memory_bytes=_memory_bytes(device),
    )
    _check_memory(found)
    return found


def runs_elsewhere(config: JobConfig) -> bool:
    """Whether a Ray cluster that is there already runs the job's actors: RAY_ADDRESS's, or this process's session."""
    ray = sys.modules.get("ray")
    has_session = ray is not None and ray.is_initialized()
    return config.runtime.executor == "ray" and (bool(os.environ.get("RAY_ADDRESS")) or has_session)


def _device(config: JobConfig) -> Literal["cpu", "cuda"] | None:
    if runs_elsewhere(config):
        return None
    device, gpus = config.model.device, config.runtime.gpus_per_actor
    wants_gpu = device == "cuda" or (gpus not in ("auto", 0) and device != "cpu")
    if wants_gpu or (device == "auto" and gpus == "auto" and any(map(os.path.exists, _GPU_SIGNS))):
        return place_here(config).model.device  # type: ignore[return-value]
    return "cpu"


def _check_cache(files: ModelFiles, cache_bytes: int, dtype: _Dtype) -> None:
    """Refuse a pool that cannot hold a single token; published configurations that leave keys out are let through."""
    text = files.config.section("text_config") if files.config.get("text_config") else files.config
    num_heads, num_layers = text.get("num_attention_heads"), text.get("num_hidden_layers")
    num_kv_heads = text.get("num_key_value_heads") or num_heads
    head_dim = text.get("head_dim") or _quotient(text, "hidden_size", num_heads)
    if not all(isinstance(number, int) for number in (num_layers, num_kv_heads, head_dim)):
        return
    block_bytes = 2 * EngineConfig().block_size * num_kv_heads * head_dim * _BYTES[dtype]
    if cache_bytes < block_bytes * num_layers:
        raise ConfigError(
            f"model.kv_cache_bytes is {cache_bytes:,}: one token needs a block of {block_bytes:,} bytes in each of the "
            f"model's {num_layers} layers, {block_bytes * num_layers:,} in all; raise it, or set it to null"
        )


def _quotient(text: JsonSection, key: str, divisor: Any) -> int | None:
    width = text.get(key)
    return width // divisor if isinstance(width, int) and isinstance(divisor, int) and divisor else None


def _check_memory(found: Preflight) -> None:
    needed = (found.weights_bytes or 0) + (found.cache_bytes or 0)
    if found.memory_bytes is not None and needed > found.memory_bytes:
        where = "this machine" if found.device == "cpu" else "the GPU"
        weights = "" if found.weights_bytes is None else f"{_gb(found.weights_bytes)} of weights in {found.dtype}, "
        raise ConfigError(
            f"one model needs {weights}{_gb(found.cache_bytes or 0)} of key/value cache, and {where} has "
            f"{_gb(found.memory_bytes)}: lower model.kv_cache_bytes, set model.dtype=bfloat16, or take a smaller model "
            "or a larger machine"
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _memory_bytes(device: str | None) -> int | None:
    """Memory of the device in all: what others use of it now may be free when the job begins."""
    if device is None:
        return None
    if device == "cuda":
        from illava.devices import cuda_memory_bytes

        return cuda_memory_bytes()
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, _container_bytes() or physical)


def _container_bytes() -> int | None:
    """The limit of the container that this process runs in (cgroups v2, v1); None without one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None

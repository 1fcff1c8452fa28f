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

from illava.decoder.state_shape import num_state_slots
from illava.engine.config import EngineConfig
from illava.families import load_spec
from illava.families.adapters import Adapter, check_adapter
from illava.families.extras import require_packages
from illava.families.hybrid_layers import HybridLayers
from illava.families.model_shape import check_plan, load_hybrid_layers
from illava.model_files import JsonSection, ModelFiles, require_tokenizer
from illava.weight_files import WeightCounts, check_options, count_stored
from pipeline.config.placement import place_here
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError

_CPU_CACHE_BYTES = 2 << 30  # `illava.vlm` takes as much where model.kv_cache_bytes is null
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GPU_SIGNS = ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/dxg")

_Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True)
class Preflight:
    """Holds what is known of a job's model before it is loaded.

    Attributes:
        device: ``cpu`` or ``cuda``; None where a cluster elsewhere decides.
        dtype: of the weights in memory.
        weights: counts of the weights; None where the hub's files are not downloaded yet.
        weights_bytes: of one actor's weights on this device; None where the hub's files are not downloaded yet.
        cache_bytes: of one actor's key/value pool; None where what the weights leave decides.
        memory_bytes: of the device that holds them; None where it is not known here.
        states: what recurrent layers keep, within ``cache_bytes``; None for a model whose layers all attend.
    """

    device: Literal["cpu", "cuda"] | None
    dtype: _Dtype
    weights: WeightCounts | None
    weights_bytes: int | None
    cache_bytes: int | None
    memory_bytes: int | None
    states: RecurrentMemory | None = None


@dataclass(frozen=True, slots=True)
class RecurrentMemory:
    """Holds what the recurrent layers of a model keep of each request, beside the key/value cache of the others.

    Attributes:
        num_layers: recurrent layers.
        num_attention_layers: the others, which keep keys and values.
        state_bytes: of one request, in all recurrent layers.
        num_states: of an actor's pool, snapshots of shared prefixes included; None where its size is not known yet.
    """

    num_layers: int
    num_attention_layers: int
    state_bytes: int
    num_states: int | None


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
    check_plan(config.reduction, model.model_id, revision=model.hub_revision)
    spec, files = load_spec(model.model_id, revision=model.hub_revision)
    _check_weights(config, files)
    require_tokenizer(files.folder)
    counts = count_stored(files.folder, files.stored_scheme)
    device = _device(config)
    cache_bytes = model.kv_cache_bytes or (_CPU_CACHE_BYTES if device == "cpu" else None)
    hybrid = load_hybrid_layers(spec, files)
    max_requests = EngineConfig(max_batch_requests=model.max_batch_requests).batch_limit(device or "cuda")
    states = _states(hybrid, cache_bytes, dtype, max_requests)
    if cache_bytes is not None:
        _check_cache(files, cache_bytes, dtype, hybrid, states)
    found = Preflight(
        device=device,
        dtype=dtype,
        weights=counts,
        weights_bytes=None if counts is None else _weights_bytes(config, files, counts, dtype),
        cache_bytes=cache_bytes,
        memory_bytes=_memory_bytes(device),
        states=states,
    )
    _check_memory(found)
    return found


def _check_weights(config: JobConfig, files: ModelFiles) -> None:
    """Refuse an adapter or a quantisation that this model cannot have, and packages that are not here for them."""
    model, here = config.model, not runs_elsewhere(config)
    check_options(
        model.model_id,
        files.config.content,
        scheme=files.stored_scheme,
        quantization=model.quantization,
        has_adapter=model.adapter is not None,
    )
    if model.adapter is not None:
        check_adapter(Adapter(model.adapter.id, model.adapter.revision, model.adapter.merge), model.model_id)
        if here:
            require_packages("adapters", "peft", purpose="model.adapter")
    if model.quantization != "none" and here:
        require_packages("quantized", "torchao", purpose=f"model.quantization {model.quantization}")
    if files.stored_scheme is not None and here:
        require_packages("quantized", *files.stored_scheme.packages, purpose=f"a checkpoint in {files.stored_scheme}")


def runs_elsewhere(config: JobConfig) -> bool:
    """Whether a Ray cluster that is there already runs the job's actors: RAY_ADDRESS's, or this process's session."""
    ray = sys.modules.get("ray")
    has_session = ray is not None and ray.is_initialized()
    return config.runtime.executor == "ray" and (bool(os.environ.get("RAY_ADDRESS")) or has_session)


def runs_on_cpu(config: JobConfig) -> bool:
    """Whether the job's models run on CPU, as far as is known before a cluster is asked; refuses nothing."""
    device, gpus = config.model.device, config.runtime.gpus_per_actor
    if device == "cuda" or gpus not in ("auto", 0):
        return device == "cpu"
    if device == "cpu" or gpus == 0:
        return True
    if runs_elsewhere(config):
        return False
    from illava.devices import has_cuda

    return not any(map(os.path.exists, _GPU_SIGNS)) or not has_cuda()


def _device(config: JobConfig) -> Literal["cpu", "cuda"] | None:
    if runs_elsewhere(config):
        return None
    device, gpus = config.model.device, config.runtime.gpus_per_actor
    wants_gpu = device == "cuda" or (gpus not in ("auto", 0) and device != "cpu")
    if wants_gpu or (device == "auto" and gpus == "auto" and any(map(os.path.exists, _GPU_SIGNS))):
        return place_here(config).model.device  # type: ignore[return-value]
    return "cpu"


def _states(
    hybrid: HybridLayers, cache_bytes: int | None, dtype: _Dtype, max_batch_requests: int
) -> RecurrentMemory | None:
    shape = hybrid.state_shape
    if shape is None:
        return None
    state_bytes = shape.num_bytes(ITEMSIZES[dtype])
    num_states = None
    if cache_bytes is not None:
        num_states = num_state_slots(cache_bytes, state_bytes, max_requests=max_batch_requests)
    return RecurrentMemory(shape.num_layers, len(hybrid.attention_layers), state_bytes, num_states)


def _check_cache(
    files: ModelFiles, cache_bytes: int, dtype: _Dtype, hybrid: HybridLayers, states: RecurrentMemory | None
) -> None:
    """Refuse a pool that cannot hold a single token; published configurations that leave keys out are let through."""
    if states is not None and not states.num_states:
        raise ConfigError(
            f"model.kv_cache_bytes is {cache_bytes:,}: half of it must hold the recurrent state of one request, "
            f"{states.state_bytes:,} bytes; raise it, or set it to null"
        )
    text = files.config.section("text_config") if files.config.get("text_config") else files.config
    num_heads, num_layers = text.get("num_attention_heads"), len(hybrid.attention_layers)
    num_kv_heads = text.get("num_key_value_heads") or num_heads
    head_dim = text.get("head_dim") or _quotient(text, "hidden_size", num_heads)
    if not all(isinstance(number, int) for number in (num_kv_heads, head_dim)):
        return
    block_bytes = 2 * EngineConfig().block_size * num_kv_heads * head_dim * ITEMSIZES[dtype]
    of_states = states.state_bytes * (states.num_states or 0) if states else 0
    if cache_bytes - of_states < block_bytes * num_layers:
        raise ConfigError(
            f"model.kv_cache_bytes is {cache_bytes:,}: one token needs a block of {block_bytes:,} bytes in each of the "
            f"model's {num_layers} layers, {block_bytes * num_layers:,} in all; raise it, or set it to null"
        )


def _weights_bytes(config: JobConfig, files: ModelFiles, counts: WeightCounts, dtype: _Dtype) -> int:
    """Memory of the weights: as stored where the GPU here keeps them so, else in the dtype or by the scheme."""
    scheme = files.stored_scheme
    if scheme is not None and scheme.weights == "float8" and _device(config) == "cuda":
        from illava.families.quantization import keeps_stored

        if keeps_stored(scheme, files.config.content, "cuda"):
            return counts.stored_bytes
    return counts.num_bytes(ITEMSIZES[dtype], config.model.quantization)


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

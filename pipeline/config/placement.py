"""Chooses what ``auto`` becomes where a job runs: the device of its models, and the GPUs each VLM actor holds.

A job is placed once, when its session begins. Whatever comes after reads the placed configuration. The choice is no
part of the config fingerprint, so a session on another machine may be placed otherwise. Of Ray this file knows only
how many GPUs it has; it asks torch only where the answer hangs on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from illava.engine.config import CPU_BATCH_REQUESTS
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError, PipelineError

_ON_CPU = "to run on CPU: runtime.gpus_per_actor=auto model.device=auto"


@dataclass(frozen=True, slots=True)
class ClusterGPUs:
    """Counts the GPUs of a Ray cluster.

    Attributes:
        on_one_node: the most that one node has now.
        may_come: that its autoscaler may add nodes with GPUs.
    """

    on_one_node: float
    may_come: bool = False


def place_on_ray(config: JobConfig, gpus: ClusterGPUs) -> JobConfig:
    """Choose the job's device and its GPUs an actor on a Ray cluster.

    Raises:
        ConfigError: it asks for GPUs that no node has or will have; waiting would not help.
    """
    device, wanted = config.model.device, config.runtime.gpus_per_actor
    if wanted == "auto":
        has_any = gpus.on_one_node >= 1 or gpus.may_come
        wanted = 1.0 if device != "cpu" and (has_any or device == "cuda") else 0.0
    if wanted > gpus.on_one_node and not gpus.may_come:
        asked = f"runtime.gpus_per_actor is {config.runtime.gpus_per_actor}"
        asked = f"model.device is cuda and {asked}" if device == "cuda" else asked
        has = f"{gpus.on_one_node:g} on the node with most" if gpus.on_one_node else "no GPU"
        raise ConfigError(
            f"{asked}: the Ray cluster has {has}, and no autoscaler that could add more; {_ON_CPU}. On a machine with "
            "a GPU, `nvidia-smi` should list it, and `ray status` the node"
        )
    return _placed(config, "cuda" if device != "cpu" and wanted else "cpu", wanted)


def place_here(config: JobConfig) -> JobConfig:
    """Choose the same for a model in this one process.

    Raises:
        ConfigError: it asks for a GPU, and there is none.
        DeviceError: likewise, as `illava.devices` says it.
    """
    device, wanted = config.model.device, config.runtime.gpus_per_actor
    if device == "cuda":
        from illava.devices import open_device

        open_device("cuda")
        return _placed(config, "cuda", 1.0 if wanted == "auto" else wanted)
    if device == "cpu" or wanted == 0:
        return _placed(config, "cpu", 0.0 if wanted == "auto" else wanted)
    from illava.devices import has_cuda

    if has_cuda():
        return _placed(config, "cuda", 1.0 if wanted == "auto" else wanted)
    if wanted != "auto":
        raise ConfigError(f"runtime.gpus_per_actor is {wanted:g}: this process sees no CUDA device; {_ON_CPU}")
    return _placed(config, "cpu", 0.0)


def gpus_of(config: JobConfig) -> float:
    """Return the GPUs that each VLM actor of a placed job holds.

    Raises:
        PipelineError: it is not placed.
    """
    gpus = config.runtime.gpus_per_actor
    if gpus == "auto":
        raise PipelineError("runtime.gpus_per_actor is read before the job was placed")
    return gpus


def batch_of(config: JobConfig) -> int:
    """Return the most requests of a running batch; of a job that is not placed, as on CPU."""
    return config.model.max_batch_requests or CPU_BATCH_REQUESTS


def said(config: JobConfig) -> str:
    """Describe a placed job's device for people, such as ``cuda, 1 GPU an actor, bfloat16``."""
    gpus = gpus_of(config)
    share = f", {gpus:g} GPU{'s' * (gpus > 1)} an actor" if gpus else ""
    return f"{config.model.device}{share}, {config.model.dtype}"


def _placed(config: JobConfig, device: str, gpus_per_actor: float) -> JobConfig:
    model = config.model.model_copy(update={"device": device})
    runtime = config.runtime.model_copy(update={"gpus_per_actor": float(gpus_per_actor)})
    return config.model_copy(update={"model": model, "runtime": runtime})

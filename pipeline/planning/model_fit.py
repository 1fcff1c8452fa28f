"""Says where a job's model would run and what memory it needs there, or refuses what this machine cannot run."""

from __future__ import annotations

from pipeline.config.preflight import Preflight, RecurrentMemory, preflight
from pipeline.runs.run_folder import Run


def model_fit(run: Run) -> list[tuple[str, str]]:
    """Return the dry run's lines about device and memory, as label and text.

    Raises:
        PlanError, ModelLoadError, ConfigError, DeviceError: as `preflight`, and as the run itself would.
    """
    found = preflight(run.config, run.config_fingerprint.fields["model.dtype"])
    lines = [("device", _device(found)), ("memory", _memory(found, run.config.runtime.num_vlm_actors.max))]
    return lines if found.states is None else [*lines, ("", _states(found.states))]


def _device(found: Preflight) -> str:
    where = found.device or "as the Ray cluster has it, which is asked when the run begins"
    return f"{where}, {found.dtype}"


def _memory(found: Preflight, num_actors: int) -> str:
    weights = (
        "weights not downloaded yet" if found.weights_bytes is None else f"{_size(found.weights_bytes)} of weights"
    )
    cache = "60 % of what they leave" if found.cache_bytes is None else f"{_size(found.cache_bytes)}"
    there = "" if found.memory_bytes is None else f"; {_size(found.memory_bytes)} here"
    return f"{weights}, {cache} of key/value cache an actor, {num_actors} at most{there}"


def _states(states: RecurrentMemory) -> str:
    """What a request takes beside its tokens' keys and values, and how many requests the pool has room for."""
    layers = f"{states.num_layers} of {states.num_layers + states.num_attention_layers} layers"
    held = "" if states.num_states is None else f"; room for {states.num_states} with snapshots of shared prefixes"
    return f"in this cache, {_size(states.state_bytes)} a request for the recurrent states of {layers}{held}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"

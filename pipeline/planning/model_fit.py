"""Says where a job's model would run and what memory it needs there, or refuses what this machine cannot run."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from illava.engine.config import CPU_BATCH_REQUESTS, GPU_BATCH_REQUESTS, EngineConfig
from illava.families import load_spec
from illava.memory_counts import CARDS_GB, memory_counts
from pipeline.config.preflight import ITEMSIZES, Preflight, RecurrentMemory, preflight, runs_on_cpu
from pipeline.config.schema import JobConfig
from pipeline.execution.batch_limit import ItemShape, most_request_tokens, pool_tokens
from pipeline.runs.run_folder import Run


def model_fit(run: Run, shapes: Collection[ItemShape] = ()) -> list[tuple[str, str]]:
    """Return the dry run's lines about device and memory, as label and text; ``shapes`` are those of the items to do.

    Raises:
        PlanError, ModelLoadError, ConfigError, DeviceError: as `preflight`, and as the run itself would.
    """
    found = preflight(run.config, run.config_fingerprint.fields["model.dtype"])
    lines = [("device", _device(found, run.config)), ("memory", _memory(found, run.config.runtime.num_vlm_actors.max))]
    if found.states is not None:
        lines.append(("", _states(found.states)))
    return [*lines, *_cards(run.config, found, shapes)]


def _device(found: Preflight, config: JobConfig) -> str:
    where = found.device or "as the Ray cluster has it, which is asked when the run begins"
    why = ""
    if config.model.dtype == "auto" and runs_on_cpu(config):
        no = "" if found.dtype == "bfloat16" else "no "
        why = f" (auto: the processor here has {no}native bfloat16 products; a run keeps its first choice)"
    return f"{where}, {found.dtype}{why}"


def _memory(found: Preflight, num_actors: int) -> str:
    weights = (
        "weights not downloaded yet" if found.weights_bytes is None else f"{_size(found.weights_bytes)} of weights"
    )
    cache = "60 % of what they leave" if found.cache_bytes is None else f"{_size(found.cache_bytes)}"
    there = "" if found.memory_bytes is None else f"; {_size(found.memory_bytes)} here"
    return f"{weights}, {cache} of key/value cache an actor, {num_actors} at most{there}"


def _cards(config: JobConfig, found: Preflight, shapes: Collection[ItemShape]) -> list[tuple[str, str]]:
    """Which common cards hold weights, activations and a pool, how many tokens it has, and the batch that it holds."""
    model = config.model
    _, files = load_spec(model.model_id, revision=model.hub_revision)
    counts = memory_counts(files, ITEMSIZES[found.dtype], EngineConfig(max_batch_requests=model.max_batch_requests))
    if found.weights is None or counts is None or model.device == "cpu":
        return []
    weights = found.weights.num_bytes(ITEMSIZES[found.dtype], model.quantization)
    if files.stored_scheme is not None and files.stored_scheme.has_common_product:
        weights = found.weights.stored_bytes
    pools = {gigabytes: pool_tokens(config, found, weights, gigabytes * 10**9) for gigabytes in CARDS_GB}
    said = [
        f"{gigabytes} GB: {'too small' if tokens is None else f'{tokens // 1000:,}k tokens cached'}"
        for gigabytes, tokens in pools.items()
    ]
    needed = f"{_size(weights)} of weights, about {_size(counts.activation_bytes)} of activations at most"
    lines = [("a card of", "; ".join(said)), ("", f"for {needed}, {_size(counts.kv_token_bytes)} a token")]
    return lines + (_batches(config, pools, most_request_tokens(config, shapes)) if shapes else [])


def _batches(config: JobConfig, pools: Mapping[int, int | None], tokens: int) -> list[tuple[str, str]]:
    """The largest batch that each card's pool holds under the job's plan, and the job's limit."""
    held = [f"{gigabytes} GB: {pool // tokens:,}" for gigabytes, pool in pools.items() if pool is not None]
    if not held:
        return []
    limit = config.model.max_batch_requests
    ruled = f"model.max_batch_requests {limit}" if limit else f"{CPU_BATCH_REQUESTS} to {GPU_BATCH_REQUESTS} are run"
    return [("batch", f"{'; '.join(held)} requests of about {tokens:,} tokens a layer; {ruled}")]


def _states(states: RecurrentMemory) -> str:
    """What a request takes beside its tokens' keys and values, and how many requests the pool has room for."""
    layers = f"{states.num_layers} of {states.num_layers + states.num_attention_layers} layers"
    held = "" if states.num_states is None else f"; room for {states.num_states} with snapshots of shared prefixes"
    return f"in this cache, {_size(states.state_bytes)} a request for the recurrent states of {layers}{held}"


def _size(num_bytes: int) -> str:
    if num_bytes < 1e5:
        return f"{num_bytes / 1e3:.3g} kB"
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"

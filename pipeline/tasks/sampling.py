"""Says how a job's ``sampling`` section asks the engine for an answer, and how it asks again after a loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from illava.requests import SamplingParams, derive_seed
from pipeline.config.schema import SamplingConfig

RETRY_TEMPERATURE = 0.2


def sampling_params(sampling: SamplingConfig, *, seed: int, choices: Sequence[Sequence[str]] = ()) -> SamplingParams:
    """Return the engine's parameters.

    Args:
        sampling: of the job.
        seed: of the request.
        choices: of each option, the texts by which an answer may name it; told of with ``logprobs`` only.
    """
    return SamplingParams(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p or 0.0,
        repetition_penalty=1.0 if sampling.repetition_penalty is None else sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty or 0.0,
        frequency_penalty=sampling.frequency_penalty or 0.0,
        stop=tuple(sampling.stop or ()),
        loop_tokens=sampling.loop_tokens,
        on_loop="stop" if sampling.on_loop == "retry" else sampling.on_loop,
        logprobs=sampling.logprobs,
        choices=tuple(map(tuple, choices)) if sampling.logprobs else (),
    )


def after_a_loop(params: SamplingParams) -> SamplingParams:
    """Return the parameters of the second try: at random, by other numbers, and the same ones on every machine."""
    temperature = max(params.temperature, RETRY_TEMPERATURE)
    return replace(params, temperature=temperature, seed=derive_seed(params.seed, "after a loop"))

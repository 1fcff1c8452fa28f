"""Says how a job's ``sampling`` section asks the engine for an answer, and how it asks again after a loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from illava.requests import SamplingParams, derive_seed
from pipeline.config.schema import SamplingConfig
from pipeline.tasks.grammar import grammar_of

RETRY_TEMPERATURE = 0.2


def sampling_params(
    sampling: SamplingConfig,
    *,
    seed: int,
    choices: Sequence[Sequence[str]] = (),
    json_schema: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """Return the engine's parameters.

    Args:
        sampling: of the job.
        seed: of the request.
        choices: of each option, the texts by which an answer may name it, the plainest first; for ``logprobs`` and for
            the grammar's choices ``options``.
        json_schema: of every answer, whatever ``sampling.grammar``.
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
        grammar=grammar_of(sampling.grammar, choices=choices, json_schema=json_schema),
    )


def after_a_loop(params: SamplingParams) -> SamplingParams:
    """Return the parameters of the second try: at random, by other numbers, and the same ones on every machine."""
    temperature = max(params.temperature, RETRY_TEMPERATURE)
    return replace(params, temperature=temperature, seed=derive_seed(params.seed, "after a loop"))

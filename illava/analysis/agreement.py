"""Measures agreement with the unreduced model: what a plan changes about a model's answers, without any label.

The unreduced model answers greedily: tokens y_1 .. y_T, the stop token included. Both models then read the same prompt
and the same y_1 .. y_(t-1) (teacher forcing), the reduced one with its reduced prompt in the cache, and each gives a
distribution of token t: p_t unreduced, q_t reduced. Then

    top-1 agreement = share of t = 1 .. T where argmax q_t = y_t
    KL = mean over t of sum_v p_t(v) (ln p_t(v) - ln q_t(v)), in nats

A plan that changes nothing has agreement 1 and KL 0. The two figures say how far the reduced model departs from the
unreduced one, not which of them is right. They say nothing about random weights, so models that declare such weights
are refused. The reference tokens are fed one by one behind the prefill: within the prefill, a score that looks at the
last prompt token would see the answer.

Everything runs through the engine's own tower, prefill and decode steps; only the draws are given.

Shape suffixes: B requests of the running batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from illava.engine.batching import Draw, sample_next_token
from illava.engine.engine import Engine
from illava.engine.request_state import RequestState
from illava.engine.sampling import SamplingBatch
from illava.errors import RandomWeightsError, RequestError
from illava.model_files import RANDOM_WEIGHTS_REASON
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.plan_input.resolve import PlanSource, resolve_plan
from illava.requests import Generation, Request
from illava.vlm import VLM

_MAX_LOGIT_BYTES = 512 << 20
_TokenKey = tuple[str, int]  # request id, number of the token


@dataclass(frozen=True, slots=True)
class Agreement:
    """Says how far one request's answer agrees with the unreduced model's.

    Attributes:
        reference: the unreduced model's greedy answer.
        num_tokens: T, 0 where ``error`` is set.
        num_same: tokens t that the reduced model would draw greedily as well.
        kl_nats: mean over t of KL(p_t || q_t).
        error: the error that ended this request in either model.
    """

    reference: Generation
    num_tokens: int
    num_same: int
    kl_nats: float
    error: Exception | None = None

    @property
    def top1_ratio(self) -> float:
        """Top-1 agreement."""
        return self.num_same / self.num_tokens if self.num_tokens else 0.0


def measure_agreement(
    vlm: VLM,
    requests: Sequence[Request],
    plan: PlanSource,
    *,
    reference: VLM | None = None,
    max_logit_bytes: int = _MAX_LOGIT_BYTES,
) -> list[Agreement]:
    """Measure the agreement of the model under ``plan`` with an unreduced one, request by request, in order.

    Args:
        vlm: without requests of its own in flight.
        requests: with distinct ids; their temperature is taken as 0. ``max_new_tokens`` bounds T.
        plan: as `VLM.generate` takes it.
        reference: the unreduced model, of the same tokenizer: the same weights before they were quantised, say. None is
            ``vlm`` itself.
        max_logit_bytes: of reference logits held at a time; more requests go in several batches.

    Raises:
        RandomWeightsError: the model's folder declares random weights.
        PlanError: the plan makes no sense for this model.
        RequestError: two requests of the same id.
        RuntimeError: requests given to ``vlm.submit`` are still running.
    """
    reference = vlm if reference is None else reference
    if vlm.family.has_random_weights or reference.family.has_random_weights:
        raise RandomWeightsError(f"agreement is not measured: {RANDOM_WEIGHTS_REASON}")
    if vlm.has_work or reference.has_work:
        raise RuntimeError("submitted requests are still running: step() until has_work is false")
    plan = resolve_plan(plan)
    greedy = [
        replace(request, sampling=replace(request.sampling, temperature=0.0), trace=False) for request in requests
    ]
    if len({request.request_id for request in greedy}) < len(greedy):
        raise RequestError("measure_agreement() was given two requests of the same id; ids must differ")
    vlm.family.check(plan)
    found: list[Agreement] = []
    for chunk in _chunks(vlm, greedy, max_logit_bytes):
        found += _of_chunk(vlm, chunk, plan, reference)
    return found


def _of_chunk(vlm: VLM, chunk: Sequence[Request], plan: ReductionPlan, reference: VLM) -> list[Agreement]:
    whole = _Recorder()
    answers = _run(_engine(reference, whole.draw), chunk, EMPTY_PLAN)
    answered = [request for request in chunk if answers[request.request_id].error is None]
    teacher = _Teacher(answers, whole.logits)
    ends = _run(_engine(vlm, teacher.draw), answered, plan)
    found = []
    for request in chunk:
        answer = answers[request.request_id]
        error = answer.error or ends[request.request_id].error
        if error is not None:
            found.append(Agreement(answer, 0, 0, 0.0, error))
            continue
        keys = [(request.request_id, step) for step in range(len(answer.token_ids))]
        kl_nats = sum(teacher.kl_nats[key] for key in keys) / len(keys)
        found.append(Agreement(answer, len(keys), sum(teacher.same[key] for key in keys), kl_nats))
    return found


def _engine(vlm: VLM, draw: Draw) -> Engine:
    """Make an engine over a VLM's model and cache that draws by ``draw``."""
    own = vlm.engine
    return Engine(own.family, own.cache, own.config, draw=draw)


def _token_keys(group: Sequence[RequestState]) -> list[_TokenKey]:
    return [(state.request_id, len(state.token_ids)) for state in group]


class _Recorder:
    """Draws the next tokens as usual, and records every step's logits."""

    def __init__(self) -> None:
        self.logits: dict[_TokenKey, Tensor] = {}

    def draw(self, logits_BV: Tensor, sampling: SamplingBatch, group: Sequence[RequestState]) -> Tensor:
        """See `illava.engine.batching.sample_next_token`."""
        self.logits |= dict(zip(_token_keys(group), logits_BV.clone(), strict=True))
        return sample_next_token(logits_BV, sampling, group)


class _Teacher:
    """Draws the reference answers' tokens, and compares its logits with the reference's."""

    def __init__(self, answers: dict[str, Generation], reference: dict[_TokenKey, Tensor]) -> None:
        self._answers, self._reference = answers, reference
        self.same: dict[_TokenKey, bool] = {}
        self.kl_nats: dict[_TokenKey, float] = {}

    def draw(self, logits_BV: Tensor, sampling: SamplingBatch, group: Sequence[RequestState]) -> Tensor:
        """See `illava.engine.batching.sample_next_token`; logits that are not finite still end their request."""
        keys = _token_keys(group)
        told_B = torch.tensor([self._answers[request_id].token_ids[step] for request_id, step in keys])
        log_p_BV = torch.stack([self._reference[key] for key in keys]).float().log_softmax(-1)
        log_q_BV = logits_BV.float().log_softmax(-1)
        kl_B = (log_p_BV.exp() * (log_p_BV - log_q_BV)).sum(-1)
        drawn_2B = sample_next_token(logits_BV, sampling, group)
        same_B = drawn_2B[0].cpu() == told_B
        self.same |= dict(zip(keys, same_B.tolist(), strict=True))
        self.kl_nats |= dict(zip(keys, kl_B.tolist(), strict=True))
        return torch.stack([told_B.to(drawn_2B), drawn_2B[1]])


def _run(engine: Engine, requests: Sequence[Request], plan: ReductionPlan) -> dict[str, Generation]:
    """Every request's end, by id."""
    return {done.request_id: done for done in engine.generate(requests, plan)}


def _chunks(vlm: VLM, requests: Sequence[Request], max_logit_bytes: int) -> Iterator[Sequence[Request]]:
    """Batches of at least one request whose reference logits stay within the bound."""
    decoder, held_bytes = vlm.family.decoder, 0
    chunk: list[Request] = []
    token_bytes = decoder.num_tokens * decoder.dtype.itemsize
    for request in requests:
        own = request.sampling.max_new_tokens * token_bytes
        if chunk and held_bytes + own > max_logit_bytes:
            yield chunk
            chunk, held_bytes = [], 0
        chunk.append(request)
        held_bytes += own
    if chunk:
        yield chunk

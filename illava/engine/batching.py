"""Validates requests, puts them into batches, isolates the request that makes a batch fail, and draws next tokens.

A request is refused by its content and its length before anything is computed for it; counts come from geometry.

Shape suffixes: B requests of a group, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from illava.engine.nucleus import FIRST
from illava.engine.request_state import RequestState
from illava.engine.sampling import SamplingBatch, draw_tokens
from illava.errors import ILLaVAError, NumericalError, RequestError, RequestTooLargeError
from illava.plan import ReductionPlan
from illava.preprocess import VisualInput
from illava.requests import Generation, OnError, Request

Outcome = int | Exception | None  # a drawn token, the error that ended the request, or neither
Draw = Callable[[Tensor, SamplingBatch, Sequence[RequestState]], Tensor]  # like `sample_next_token`, the default


def check_content(request: Request) -> None:
    """Refuse content that is not text and prepared media, and a conversation in which the media are not the user's.

    Raises:
        RequestError: one string, an item of another type, or nothing to answer.
    """
    name = f"request {request.request_id!r}"
    for message in request.messages:
        _check_parts(name, message.content)
        if message.role != "user" and any(not isinstance(part, str) for part in message.content):
            raise RequestError(f"{name}: its {message.role} message holds media; media belong into a user turn")
    if not any(part.strip() if isinstance(part, str) else True for part in request.content):
        raise RequestError(f"{name} is empty; give it text, an image or a video")


def _check_parts(name: str, content: Sequence[str | VisualInput]) -> None:
    if isinstance(content, str):
        raise RequestError(
            f"{name}: its content is one string; give a tuple of media and text, as in (video, {content!r})"
        )
    for index, part in enumerate(content):
        if not isinstance(part, str | VisualInput):
            raise RequestError(
                f"{name}: item {index} of its content is a {type(part).__name__}; give text, or media from "
                "`pipeline.read_media(path, model)` or `load_preprocessor(model)`"
            )


def check_encoding(request: Request, plan: ReductionPlan, *, num_media: int) -> None:
    """Refuse encoded media that are not those of this request under its plan.

    Raises:
        RequestError: of other media or another plan, or a trace is asked for, which needs the tower.
    """
    kept, name = request.encoding, f"request {request.request_id!r}"
    if kept is None:
        return
    if kept.plan != plan or len(kept.media) != num_media:
        raise RequestError(
            f"{name}: its encoding is of {len(kept.media)} media under plan {kept.plan.digest()[:8]}, the request has "
            f"{num_media} under {plan.digest()[:8]}; give the encoding of the same media under the same plan"
        )
    if request.trace:
        raise RequestError(f"{name}: there is no trace of media that were encoded before; leave out encoding")


def check_length(request: Request, plan: ReductionPlan, *, num_vision_tokens: int, max_positions: int) -> None:
    """Refuse media that cannot fit together with the answer, whatever the text, before the tower runs for them.

    In the geometric layout the media take the positions of the unreduced model. The released layout closes the gaps.
    There `illava.engine.prompt.assemble` decides, as it does about the text's tokens and about media that stage
    ``media`` makes smaller.

    Args:
        request: the request.
        plan: its plan.
        num_vision_tokens: visual tokens of the unreduced model.
        max_positions: positions of the decoder.

    Raises:
        RequestTooLargeError: the media are too long; says by how much, and what to lower.
    """
    num_new = request.sampling.max_new_tokens
    fixed = plan.layout == "geometric" and plan.at("media") is None
    if fixed and num_vision_tokens + num_new > max_positions:
        raise RequestTooLargeError(
            f"request {request.request_id!r}: {num_vision_tokens} prompt tokens of its media and {num_new} new tokens "
            f"exceed the model's {max_positions} positions; send fewer or smaller frames, images or pages at once, or "
            "lower max_new_tokens"
        )


def take_batch(
    queue: Iterable[RequestState], capacity: int, budget: float, weigh: Callable[[RequestState], float]
) -> list[RequestState]:
    """Take the head of a queue, and later requests of the same plan while capacity and budget last; in order."""
    group: list[RequestState] = []
    for state in queue:
        if len(group) >= capacity:
            break
        if group and (state.plan != group[0].plan or state.request.trace != group[0].request.trace):
            continue
        budget -= weigh(state)
        if group and budget < 0:
            break
        group.append(state)
    return group


def run_with_fallback(
    work: Callable[[Sequence[RequestState]], list[Outcome]], group: Sequence[RequestState]
) -> list[Outcome]:
    """Run work over a group; if it fails, run it over each request alone, so that only the failing one ends."""
    try:
        return work(group)
    except ILLaVAError as error:
        if len(group) == 1:
            return [error]
    return [outcome for state in group for outcome in run_with_fallback(work, [state])]


def collect(ended: Sequence[Generation], errors: OnError) -> dict[str, Generation]:
    """Return generations by the ids of their requests; under ``raise``, raise the error of the first that has one."""
    failed = next((one for one in ended if one.error is not None), None)
    if errors == "raise" and failed is not None and failed.error is not None:
        failed.error.add_note(
            f"raised by request {failed.request_id!r}; with errors='return' the other requests of the call are "
            "answered, and this error stands in the request's Generation.error"
        )
        raise failed.error
    return {generation.request_id: generation for generation in ended}


def sample_next_token(logits_BV: Tensor, sampling: SamplingBatch, group: Sequence[RequestState]) -> Tensor:
    """Draw next tokens, and tell whether the logits were finite: int64 [2, B].

    Without a host synchronisation, but for rows that are drawn at random from a large vocabulary: the host asks whether
    the most probable tokens decide every draw of these, and has whole rows sorted where they do not.
    """
    draws = sampling.draws([(state.request_id, len(state.token_ids)) for state in group])
    if not sampling.random or logits_BV.shape[-1] <= FIRST:
        return draw_tokens(logits_BV, sampling, draws)
    drawn_2B = draw_tokens(logits_BV, sampling, draws, first=FIRST)
    return draw_tokens(logits_BV, sampling, draws) if bool((drawn_2B[1] > 1).any()) else drawn_2B


def sampling_of(group: Sequence[RequestState], device: torch.device, *, first: bool = False) -> SamplingBatch:
    """Make the sampling of a group's rows; ``first`` where their first tokens are drawn, which tell of the options."""
    return SamplingBatch.of(
        [state.request.sampling for state in group],
        device,
        histories=lambda row: group[row].history(),
        grammars=[state.grammar for state in group],
        choice_ids=[state.choice_ids for state in group] if first else (),
    )


def to_outcomes(drawn_2B: Tensor, group: Sequence[RequestState]) -> list[Outcome]:
    """Turn drawn tokens, copied to the host once a step, to outcomes; probabilities go to those that asked for them."""
    told = drawn_2B[2:].int().view(torch.float32).tolist()  # log-probabilities, then a row for each option
    for state, logprob, *options in zip(group, *told, strict=True) if told else ():
        if state.request.sampling.logprobs:
            state.token_logprobs[len(state.token_ids) :] = [logprob]
        if options and state.choice_ids and all(state.choice_ids):
            state.choice_probabilities = tuple(options[: len(state.choice_ids)])
    drawn = zip(group, *drawn_2B[:2].tolist(), strict=True)
    return [_outcome(state, token_id, bool(finite)) for state, token_id, finite in drawn]


def _outcome(state: RequestState, token_id: int, finite: bool) -> Outcome:
    if not finite:
        return _not_finite(state)
    if state.grammar is not None and state.grammar.problem is not None:
        return RequestError(f"request {state.request_id!r}: {state.grammar.problem}")
    return token_id


def _not_finite(state: RequestState) -> NumericalError:
    where = f"request {state.request_id!r}: logits of token {len(state.token_ids)}"
    return NumericalError(f"{where} are not finite; load the model in bfloat16 or float32")

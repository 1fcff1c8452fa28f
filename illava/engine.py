"""Continuous batching: requests are encoded, prefilled and decoded in shared packed calls, joining and leaving freely.

A step runs the tower for one group of waiting requests, prefills one group of encoded ones, and draws one token for
every running request. A group shares a plan; the running batch may mix plans, since page tables are per request and
layer. What goes wrong with one request ends that request alone. Knows families and decoders by their interface, and
nothing of weights, files or processes.

Shape suffixes: B requests of the running batch, P rotary axes, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from illava.admission import check_content, check_length
from illava.cache import BatchPages, PagedCache
from illava.errors import ILLaVAError, NumericalError, RequestError, RequestTooLargeError
from illava.families.base import Family
from illava.lifecycle import LiveRequest, State
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.prompt import assemble, join_trace, media_of, pack
from illava.requests import Generation, Request
from illava.sampling import check_sampling, derive_seed, sample, uniform_draw
from illava.scopes import planned_lengths

_Outcome = int | Exception | None  # a drawn token, what ended the request, or neither


@dataclass(frozen=True, slots=True)
class _RunningBatch:
    """Device tensors of one composition of the running batch."""

    pages: BatchPages
    position_PB: Tensor


class Engine:
    """The scheduler of one model on one device. Not thread-safe: one owner submits and steps.

    Args:
        family: the loaded model.
        cache: its pool of key/value pages.
        max_batch_requests: requests encoded or running at a time.
        max_vision_patches: patches of one tower call, unless a single request has more.
        max_prefill_tokens: prompt tokens of one prefill, unless a single request has more.
        now: a monotonic clock in seconds.

    Attributes:
        device_busy_s: seconds of all tower, prefill and decode steps; equals the sum of `Timing.device_s`.
    """

    def __init__(
        self,
        family: Family,
        cache: PagedCache,
        *,
        max_batch_requests: int = 32,
        max_vision_patches: int = 32_768,
        max_prefill_tokens: int = 16_384,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.family, self.decoder, self.cache = family, family.decoder, cache
        self.max_batch_requests = max_batch_requests
        self.max_vision_patches, self.max_prefill_tokens = max_vision_patches, max_prefill_tokens
        self.device_busy_s = 0.0
        self._now = now
        self._waiting: deque[LiveRequest] = deque()
        self._encoded: deque[LiveRequest] = deque()
        self._running: list[LiveRequest] = []
        self._ids: set[str] = set()
        self._batch: _RunningBatch | None = None  # of `_running` as it is now
        self._finished: list[Generation] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._encoded or self._running or self._finished)

    def submit(self, request: Request, plan: ReductionPlan = EMPTY_PLAN) -> None:
        """Queue a request.

        Raises:
            PlanError: the plan makes no sense for this model.
            RequestError: content or sampling that mean nothing, media that cannot fit, or an id that is in flight.
        """
        self.family.check(plan)
        check_sampling(request.sampling)
        check_content(request)
        if request.request_id in self._ids:
            raise RequestError(f"request {request.request_id!r} is in flight already; ids must differ")
        media = media_of(request)
        live = LiveRequest(request, plan, media, now=self._now())
        live.num_patches = sum(map(self.family.num_patches, media))
        live.num_vision_tokens = count = sum(map(self.family.num_vision_tokens, media))
        check_length(request, plan, num_vision_tokens=count, max_positions=self.decoder.max_positions)
        self._waiting.append(live)
        self._ids.add(request.request_id)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """One round of tower, prefill and decode; the generations that ended in it.

        Errors of one request end up in its generation. What else is raised (out of memory, a device error) leaves
        all requests where they were: `cancel_all` frees them.
        """
        self._encode()
        self._prefill()
        self._decode()
        finished, self._finished = self._finished, []
        return finished

    def cancel_all(self) -> list[str]:
        """Drop every request that `step` has not returned, and free its pages; the ids dropped."""
        dropped = [live.request_id for live in (*self._waiting, *self._encoded, *self._running)]
        dropped += [generation.request_id for generation in self._finished]
        for request_id in dropped:
            self.cache.free(request_id)
        self._waiting.clear()
        self._encoded.clear()
        self._ids.clear()
        self._running, self._finished, self._batch = [], [], None
        return dropped

    def _encode(self) -> None:
        room = self.max_batch_requests - len(self._encoded) - len(self._running)
        group = _front(self._waiting, room, self.max_vision_patches, lambda live: live.num_patches)
        if not group:
            return
        with self._timed("vision", group, [live.num_patches for live in group]):
            outcomes = _isolated(self._encode_group, group)
        for live in group:
            self._waiting.remove(live)
            live.enter("queue", self._now())
        self._encoded += self._settle(group, outcomes)

    def _encode_group(self, group: Sequence[LiveRequest]) -> list[_Outcome]:
        """Tower, projector and layout of all media in packed calls, then each request's prompt."""
        media = [medium for live in group for medium in live.media]
        seeds = [seed for live in group for seed in live.medium_seeds]
        encoded = iter(self.family.encode(media, group[0].plan, trace=group[0].request.trace, seeds=seeds))
        for live in group:
            live.encoded = list(islice(encoded, len(live.media)))
        return [self._assemble(live) for live in group]

    def _assemble(self, live: LiveRequest) -> _Outcome:
        sampling, encoded = live.request.sampling, live.encoded
        live.num_patches = sum(medium.num_patches for medium in encoded)
        try:
            live.prompt = assemble(self.family, live.request, encoded)
        except RequestError as error:
            return error
        lengths = planned_lengths(live.prompt.runs, live.plan, self.decoder.num_layers)
        live.reserved = [n + sampling.max_new_tokens for n in lengths]
        needed = self.cache.num_pages_for(live.reserved)
        if needed > self.cache.num_pages:
            return RequestTooLargeError(
                f"request {live.request_id!r} needs {needed} key/value pages, the whole pool has "
                f"{self.cache.num_pages}; raise kv_cache_bytes, send fewer frames, or lower max_new_tokens"
            )
        return None

    def _prefill(self) -> None:
        room, group = self.max_batch_requests - len(self._running), []
        for live in _front(self._encoded, room, self.max_prefill_tokens, lambda live: live.prompt.num_tokens):
            if self.cache.num_pages_for(live.reserved) > self.cache.num_free_pages:
                break
            self.cache.admit(live.request_id, live.reserved)
            group.append(live)
        if not group:
            return
        with self._timed("prefill", group, [live.prompt.num_tokens for live in group]):
            outcomes = _isolated(self._prefill_group, group)
        for live in group:
            self._encoded.remove(live)
            live.enter("decode", self._now())
            live.release_prompt()
        self._running += self._settle(group, outcomes)
        self._batch = None

    def _prefill_group(self, group: Sequence[LiveRequest]) -> list[_Outcome]:
        empty = [[0] * self.decoder.num_layers] * len(group)
        done = self.decoder.prefill(
            pack([live.prompt for live in group]),
            group[0].plan,
            self.cache,
            self.cache.batch([live.request_id for live in group], empty),
            seeds=[derive_seed(live.request.sampling.seed, live.request_id) for live in group],
            traced=[row for row, live in enumerate(group) if live.request.trace],
        )
        outcomes = self._draw(done.logits_BV, group)
        for row, live in enumerate(group):
            live.lengths = [lengths[row] for lengths in done.lengths_LB]
            live.num_visual = [counts[row] for counts in done.num_visual_LB]
            live.next_position_P = live.prompt.next_position_P
            self.cache.trim(live.request_id, [n + live.request.sampling.max_new_tokens for n in live.lengths])
            if row in done.traces:
                live.trace = join_trace(live.encoded, live.prompt, done.traces[row])
            outcomes[row] = done.errors.get(row, outcomes[row])
        return outcomes

    def _decode(self) -> None:
        group = self._running
        if not group:
            return
        with self._timed("decode", group, [1] * len(group)):
            outcomes = self._decode_group(group)
        self._running = self._settle(group, outcomes)
        if len(self._running) < len(group):
            self._batch = None

    def _decode_group(self, group: Sequence[LiveRequest]) -> list[_Outcome]:
        if self._batch is None:
            held = [[n + len(live.token_ids) - 1 for n in live.lengths] for live in group]
            positions = [live.next_position_P + len(live.token_ids) - 1 for live in group]
            pages = self.cache.batch([live.request_id for live in group], held)
            self._batch = _RunningBatch(pages, torch.stack(positions, 1))
        token_B = torch.tensor([live.token_ids[-1] for live in group], device=self.decoder.device)
        hidden_BD = self.family.embed(token_B)
        logits_BV = self.decoder.decode(hidden_BD, self._batch.position_PB, self.cache, self._batch.pages)
        self._batch.position_PB.add_(1)
        return self._draw(logits_BV, group)

    def _draw(self, logits_BV: Tensor, group: Sequence[LiveRequest]) -> list[_Outcome]:
        params = [live.request.sampling for live in group]
        draws = [
            uniform_draw(own.seed, live.request_id, len(live.token_ids)) if own.temperature else 0.0
            for own, live in zip(params, group, strict=True)
        ]
        drawn = zip(group, *sample(logits_BV, params, draws), strict=True)
        return [token_id if finite else _not_finite(live) for live, token_id, finite in drawn]

    def _settle(self, group: Sequence[LiveRequest], outcomes: Sequence[_Outcome]) -> list[LiveRequest]:
        """Take each request's token or error; end those that are done; the others."""
        going_on, now = [], self._now()
        for live, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Exception):
                ended = live.fail(outcome, now)
            else:
                reason = None if outcome is None else live.accept(outcome, self.family.stop_token_ids)
                if reason is None:
                    going_on.append(live)
                    continue
                ended = live.finish(reason, self.family.decode_text, now)
            self._finished.append(ended)
            self._ids.discard(live.request_id)
            self.cache.free(live.request_id)
        return going_on

    @contextmanager
    def _timed(self, state: State, group: Sequence[LiveRequest], weights: Sequence[int]) -> Iterator[None]:
        """Put a group into a state for the time of the block, and share that time by weight."""
        start = self._now()
        for live in group:
            live.enter(state, start)
        yield
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)
        taken_s, total = self._now() - start, sum(weights)
        self.device_busy_s += taken_s
        for live, weight in zip(group, weights, strict=True):
            live.device_s += taken_s * (weight / total if total else 1 / len(group))


def _not_finite(live: LiveRequest) -> NumericalError:
    where = f"request {live.request_id!r}: logits of token {len(live.token_ids)}"
    return NumericalError(f"{where} are not finite; load the model in bfloat16 or float32")


def _front(queue: deque[LiveRequest], room: int, budget: int, weigh: Callable[[LiveRequest], int]) -> list[LiveRequest]:
    """The head of a queue and what follows it with the same plan, while there is room and budget; in order."""
    group: list[LiveRequest] = []
    for live in queue:
        if len(group) >= room:
            break
        if group and (live.plan != group[0].plan or live.request.trace != group[0].request.trace):
            continue
        budget -= weigh(live)
        if group and budget < 0:
            break
        group.append(live)
    return group


def _isolated(work: Callable[[Sequence[LiveRequest]], list[_Outcome]], group: Sequence[LiveRequest]) -> list[_Outcome]:
    """Work over a group; where one request breaks it, over each alone, so that only that one ends."""
    try:
        return work(group)
    except ILLaVAError as error:
        if len(group) == 1:
            return [error]
    return [outcome for live in group for outcome in _isolated(work, [live])]

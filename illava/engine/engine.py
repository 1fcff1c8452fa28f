"""Batches requests continuously: encodes, prefills and decodes them in shared packed calls that they join and leave.

A step runs the tower for one group of waiting requests, prefills one group of encoded requests, and draws one token for
every running request. While few of the requests decode that could, it encodes and prefills further groups first: a
decode step reads all weights, for one row as for many. A group shares one plan. The running batch may mix plans, since
block tables are per request and layer. An error of one request ends that request alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from illava.decoder.cuda_graphs import DecodeGraphs
from illava.decoder.kv_cache import PagedCache
from illava.engine.batching import (
    Draw,
    Outcome,
    check_content,
    check_encoding,
    check_length,
    collect,
    run_with_fallback,
    sample_next_token,
)
from illava.engine.config import EngineConfig
from illava.engine.decode_phase import DecodePhase
from illava.engine.encode_phase import EncodePhase
from illava.engine.media_phase import MediaPhase
from illava.engine.prefill_phase import PrefillPhase
from illava.engine.prefix_sharing import MediaDedupCache, patches_per_request
from illava.engine.request_state import Phase, RequestState
from illava.engine.sampling import check_sampling, own_first_tokens
from illava.errors import RequestError
from illava.families.base import Family
from illava.grammar.answer import GrammarCompiler
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.reduction.probe import AttentionProbe
from illava.requests import Generation, OnError, Request

_DEFAULTS = EngineConfig()
_MANY_DECODE = 7 / 8  # of the requests that could: from there on a long prompt goes in by chunks beside them


class Engine:
    """Schedules the requests of one model on one device. Not thread-safe: one thread submits and steps.

    Args:
        family: the loaded model.
        cache: its pool of key/value blocks.
        config: its limits of batches and steps; the pool and the graphs are built already.
        now: a monotonic clock in seconds.
        draw: the next tokens from the logits of a step.
        graphs, looks_ahead: see `DecodePhase`.
        probe: is given the attention of tower and prefill, layer by layer; see `illava.analysis.attention_maps`.

    Attributes:
        decode_phase: runs the decode steps, and counts them.
        device_busy_s: seconds of all tower, prefill and decode steps; equals the sum of `Timing.device_s`.
    """

    def __init__(
        self,
        family: Family,
        cache: PagedCache,
        config: EngineConfig = _DEFAULTS,
        *,
        now: Callable[[], float] = time.perf_counter,
        draw: Draw = sample_next_token,
        graphs: DecodeGraphs | None = None,
        probe: AttentionProbe | None = None,
        looks_ahead: bool | None = None,
    ) -> None:
        self.family, self.decoder, self.cache = family, family.decoder, cache
        self.config, self._max_batch = config, config.batch_limit(self.decoder.device.type)
        self.device_busy_s, self._now = 0.0, now
        self._media_phase, self._dedup = MediaPhase(family), MediaDedupCache()
        self._grammars = GrammarCompiler(family.tokenizer, family.decoder.num_tokens, family.stop_token_ids)
        self._encode_phase = EncodePhase(
            family,
            self._media_phase,
            self._dedup,
            cache,
            max_patches=config.max_vision_patches,
            max_companions=self._max_batch,
            probe=probe,
        )
        limits = {"max_tokens": config.max_prefill_tokens, "max_chunk_tokens": config.max_chunk_tokens}
        self._prefill_phase = PrefillPhase(family.decoder, cache, **limits, draw=draw, probe=probe)
        self.decode_phase = DecodePhase(family, cache, graphs=graphs, draw=draw, looks_ahead=looks_ahead)
        self._waiting: deque[RequestState] = deque()
        self._encoded: deque[RequestState] = deque()
        self._running: list[RequestState] = []
        self._ids: set[str] = set()
        self._finished: list[Generation] = []
        self._caught_up = False  # in this step, see `_catch_up`

    @property
    def graphs(self) -> DecodeGraphs | None:
        """The captured decode steps, if steps are captured."""
        return self.decode_phase.graphs

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._encoded or self._running or self._finished)

    def submit(self, request: Request, plan: ReductionPlan = EMPTY_PLAN) -> None:
        """Queue a request.

        Raises:
            PlanError: the plan makes no sense for this model.
            RequestError: invalid content, sampling or grammar, media that cannot fit, or an id that is in flight.
        """
        self._media_phase.check(plan)
        check_sampling(request.sampling)
        check_content(request)
        self.family.check_template_args(request.template_args)
        if request.request_id in self._ids:
            raise RequestError(f"request {request.request_id!r} is in flight already; ids must differ")
        request = self._dedup.intern(request)
        media = request.media
        now, (plan, content) = self._now(), self._media_phase.route(plan, media)
        state = RequestState(request, plan, media, content=content, now=now)
        check_encoding(request, plan, num_media=len(media))
        state.choice_ids = own_first_tokens(request.sampling.choices, self.family.first_token)
        if request.sampling.grammar is not None:
            state.grammar = self._grammars.begin(request.sampling.grammar, state.token_ids)
        state.num_patches = sum(map(self.family.num_patches, media))
        state.num_vision_tokens = count = sum(map(self.family.num_vision_tokens, media))
        check_length(request, plan, num_vision_tokens=count, max_positions=self.decoder.max_positions)
        self._waiting.append(state)
        self._ids.add(request.request_id)

    def generate(
        self, requests: Sequence[Request], plan: ReductionPlan = EMPTY_PLAN, *, errors: OnError = "return"
    ) -> list[Generation]:
        """Answer all requests, in their order; see `VLM.generate`, which raises errors of requests by default."""
        if self.has_work:
            raise RuntimeError("submitted requests are still running: step() until has_work is false, then generate()")
        ids = [request.request_id for request in requests]
        if len(set(ids)) < len(ids):
            raise RequestError("generate() was given two requests of the same id; ids must differ")
        done: dict[str, Generation] = {}
        try:
            for request in requests:
                try:
                    self.submit(request, plan)
                except RequestError as error:
                    done |= collect([Generation.failed(request.request_id, error)], errors)
            while self.has_work:
                done |= collect(self.step(), errors)
        except BaseException:
            self.cancel_all()  # out of memory, an interrupt: no request of this call may stay in the next
            raise
        return [done[request_id] for request_id in ids]

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Admit requests, and draw a token of every running one; returns the generations that ended.

        The error of one request is in its generation. Any other error (out of memory, a device error) leaves all
        requests where they were: `cancel_all` frees them.
        """
        with torch.cuda.device_of(self.cache.k_pool_PSGd):  # our kernels and graphs go to the current device
            self._admit()
            self._decode()
        finished, self._finished = self._finished, []
        return finished

    def cancel_all(self) -> list[str]:
        """Drop every request that `step` has not returned, and free its blocks; returns the dropped ids."""
        dropped = [state.request_id for state in (*self._waiting, *self._encoded, *self._running)]
        dropped += [ended.request_id for ended in self._finished]
        for request_id in dropped:
            self.cache.free(request_id)
        self._waiting.clear()
        self._encoded.clear()
        self._ids.clear()
        self._running, self._finished = [], []
        self._caught_up = False
        self._prefill_phase.drop()
        self.decode_phase.drop()
        return dropped

    def _admit(self) -> None:
        """Encode and prefill a group; then more of them, while few requests decode and no answer waits to be told."""
        goes_on = True
        while goes_on:
            self._encode()
            goes_on = self._prefill() and self._few_decode and not self._finished

    @property
    def _few_decode(self) -> bool:
        """Whether requests wait that could decode, too, and those that do are few beside all of them."""
        num_all = len(self._running) + len(self._encoded) + len(self._waiting)
        return len(self._running) < _MANY_DECODE * min(num_all, self._max_batch)

    def _encode(self) -> None:
        if self._prefill_phase.fills_pool(self._encoded):
            return
        capacity = self._max_batch - len(self._encoded) - len(self._running)
        group = self._encode_phase.choose(self._waiting, capacity)
        if not group:
            return
        self._catch_up()
        with self._timed("vision", group, patches_per_request(self.family, group)):
            outcomes = run_with_fallback(self._encode_phase.run, group)
        for state in group:
            self._waiting.remove(state)
            state.enter("queue", self._now())
        self._encoded += self._settle(group, outcomes)

    def _prefill(self) -> bool:
        """Prefill a group further; returns whether it is done, so that another may follow."""
        capacity = self._max_batch - len(self._running)
        group = self._prefill_phase.choose(self._encoded, self._running, capacity)
        if not group:
            return False
        self._catch_up()
        with self._timed("prefill", group, [state.prompt.num_tokens - state.num_computed for state in group]):
            outcomes = self._prefill_phase.advance(decoding=not self._few_decode)
        for state in group:
            state.enter("queue" if outcomes is None else "decode", self._now())
        if outcomes is None:
            return False
        for state in group:
            self._encoded.remove(state)
            state.release_prompt()
        self._running += self._settle(group, outcomes)
        return True

    def _decode(self) -> None:
        if self._running and self._caught_up:  # they have their token of this step
            with self._decoding():
                self.decode_phase.queue(self._running)
        elif self._running:
            with self._decoding():
                outcomes = self.decode_phase.advance(self._running)
            self._settle_running(outcomes)
        self._caught_up = False

    def _catch_up(self) -> None:
        """Read the decode step that is queued, if one is, before the device does other work."""
        if self.decode_phase.has_unread:
            with self._decoding():
                outcomes = self.decode_phase.catch_up(self._running)
            self._settle_running(outcomes)
            self._caught_up = True

    def _decoding(self) -> AbstractContextManager[None]:
        return self._timed("decode", self._running, [1] * len(self._running), waits=False)

    def _settle_running(self, outcomes: Sequence[Outcome]) -> None:
        self._running = self._settle(self._running, outcomes)
        if not self._running:
            self.decode_phase.drop()

    def _settle(self, group: Sequence[RequestState], outcomes: Sequence[Outcome]) -> list[RequestState]:
        """Give each request its token or error, and end those that are done; returns the others."""
        going_on, now = [], self._now()
        for state, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Exception):
                ended = state.fail(outcome, now)
            else:
                decode_text = self.family.decode_text
                reason = None if outcome is None else state.accept(outcome, self.family.stop_token_ids, decode_text)
                if reason is None:
                    going_on.append(state)
                    continue
                ended = state.finish(reason, decode_text, now)
            self._finished.append(ended)
            self._ids.discard(state.request_id)
            self.cache.free(state.request_id)
        return going_on

    @contextmanager
    def _timed(
        self, phase: Phase, group: Sequence[RequestState], weights: Sequence[float], *, waits: bool = True
    ) -> Iterator[None]:
        """Put a group into a phase for the time of the ``with`` block, and divide that time by weight.

        ``waits``: the device is waited for at the end; a decode step waits for its tokens alone.
        """
        start = self._now()
        for state in group:
            state.enter(phase, start)
        yield
        if waits and self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)
        taken_s, total = self._now() - start, sum(weights)
        self.device_busy_s += taken_s
        for state, weight in zip(group, weights, strict=True):
            state.device_s += taken_s * (weight / total if total else 1 / len(group))

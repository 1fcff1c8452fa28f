"""Runs the third phase of requests in the engine: one decode step draws the next token of every running request.

On a GPU the step after the next is queued before the host has read the tokens of the first: these stay on the device
as that step's input, and the host reads while the device goes on. So what ends an answer is seen one step late. The
surplus token is dropped, and its key lies within the request's own blocks, since they are taken for every token it may
draw, the last one's key included. A request that leaves ends the looking ahead: the step that is queued is read first.

Shape suffixes: B requests of the running batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from illava.decoder.cuda_graphs import DecodeGraphs
from illava.decoder.decode import Step, StepInputs, decode_step
from illava.decoder.kv_cache import PagedCache
from illava.engine.batching import Draw, Outcome, sample_next_token, sampling_of, to_outcomes
from illava.engine.request_state import RequestState
from illava.engine.sampling import SamplingBatch
from illava.families.base import Family
from illava.host_copies import on_device


@dataclass(frozen=True, slots=True)
class _RunningBatch:
    """Holds the device tensors of one composition of the running batch; drawn tokens stay on the device."""

    states: list[RequestState]
    step: Step
    token_B: Tensor
    sampling: SamplingBatch


@dataclass(frozen=True, slots=True)
class _Unread:
    """Holds the tokens of a queued step on their way to the host."""

    states: list[RequestState]
    drawn_2B: Tensor
    arrived: torch.cuda.Event | None

    def read(self, group: Sequence[RequestState]) -> list[Outcome]:
        """Wait for the tokens; returns those of the group, which are the rows that have not ended since."""
        if self.arrived is not None:
            self.arrived.synchronize()
        outcomes = dict(zip(self.states, to_outcomes(self.drawn_2B, self.states), strict=True))
        return [outcomes[state] for state in group]


class DecodePhase:
    """Decodes the running batch of one engine.

    Args:
        family: the loaded model.
        cache: its pool of blocks.
        graphs: captured decode steps; None runs decode steps operation by operation.
        draw: draws the next tokens from the logits of a step.
        looks_ahead: queue a step before the last one's tokens are read; None where work on the device goes on while the
            host does. A ``draw`` of one's own sees the tokens so far, so nothing is queued ahead of it.

    Attributes:
        num_steps: decode steps so far.
    """

    def __init__(
        self,
        family: Family,
        cache: PagedCache,
        *,
        graphs: DecodeGraphs | None = None,
        draw: Draw = sample_next_token,
        looks_ahead: bool | None = None,
    ) -> None:
        self._family, self._decoder, self._cache, self._draw = family, family.decoder, cache, draw
        self.graphs, self._owns_draw = graphs, draw is sample_next_token
        is_cuda = self._decoder.device.type == "cuda"
        self._looks_ahead = self._owns_draw and (is_cuda if looks_ahead is None else looks_ahead)
        self._batch: _RunningBatch | None = None
        self._unread: _Unread | None = None
        self.num_steps = 0

    def advance(self, group: Sequence[RequestState]) -> list[Outcome]:
        """Draw the next token of every request, and queue the step after it where that can be known to be wanted."""
        unread = self._unread or self._queued(group)
        self._unread = self._queued(group) if self._goes_on(group, unread) else None
        return unread.read(group)

    def queue(self, group: Sequence[RequestState]) -> None:
        """Queue a step of these requests, whose tokens so far have all been read; it is read later."""
        self._unread = self._queued(group)

    @property
    def has_unread(self) -> bool:
        """Whether a step is queued whose tokens were not read yet."""
        return self._unread is not None

    def catch_up(self, group: Sequence[RequestState]) -> list[Outcome]:
        """Read the step that is queued, before requests join or the device does other work."""
        if self._unread is None:
            raise RuntimeError("no step is queued: ask has_unread first")
        unread, self._unread = self._unread, None
        return unread.read(group)

    def drop(self) -> None:
        """Forget the batch and what is queued; nobody will read it."""
        self._batch = self._unread = None

    def _goes_on(self, group: Sequence[RequestState], unread: _Unread) -> bool:
        """Whether the same batch decodes once more, whatever its unread tokens are, for some of its requests at least.

        Rows with a grammar must know their token before the next one can be masked. Rows that are drawn at random are
        read at once: now and then the host has to sort all of a row (see `illava.engine.nucleus`). Stop texts, loops
        and stop tokens end an answer, and change no token before; penalties are counted on the device.
        """
        batch = self._batch
        if not self._looks_ahead or batch is None or batch.states != unread.states or len(group) != len(batch.states):
            return False
        if batch.sampling.grammars is not None or batch.sampling.random:
            return False
        return any(len(state.token_ids) + 1 < state.request.sampling.max_new_tokens for state in group)

    def _queued(self, group: Sequence[RequestState]) -> _Unread:
        if self._batch is None or self._batch.states != list(group):
            self._batch = self._compose(group)
        batch, self.num_steps = self._batch, self.num_steps + 1
        logits_BV, greedy_3B = batch.step()
        if greedy_3B is not None and self._owns_draw and batch.sampling.is_greedy:
            # fixed tensors, which the next step writes again; copied whole, as they lie
            host_3B = greedy_3B.to("cpu", non_blocking=True, copy=True)
            drawn_2B = host_3B[: batch.sampling.num_greedy_rows, : len(group)]
        else:
            drawn_2B = self._draw(logits_BV, batch.sampling, group)
            batch.token_B.copy_(drawn_2B[0])
            batch.sampling.count(batch.token_B)
            drawn_2B = drawn_2B.to("cpu", non_blocking=True)
        arrived = None
        if self._decoder.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return _Unread(batch.states, drawn_2B, arrived)

    def _compose(self, group: Sequence[RequestState]) -> _RunningBatch:
        """Make the tensors that stay on the device until a request joins or leaves."""
        num_computed = [[n + len(state.token_ids) - 1 for n in state.lengths] for state in group]
        num_biased = [state.num_biased for state in group]
        blocks = self._cache.batch([state.request_id for state in group], num_computed, num_biased)
        newest = [[state.token_ids[-1], len(state.token_ids) - 1] for state in group]
        token_B, num_behind_B = on_device(newest, self._decoder.device).unbind(1)
        position_PB = torch.stack([state.next_position_P for state in group], 1) + num_behind_B
        inputs = StepInputs(blocks, position_PB, token_B.contiguous())
        if self.graphs is None:
            step: Step = partial(self._eager_step, inputs)
        else:
            inputs, step = self.graphs.load(inputs)
        return _RunningBatch(list(group), step, inputs.token_B, sampling_of(group, self._decoder.device))

    def _eager_step(self, inputs: StepInputs) -> tuple[Tensor, Tensor | None]:
        return decode_step(self._decoder, self._family.embed, self._cache, inputs), None

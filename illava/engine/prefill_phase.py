"""Runs the second phase of a request in the engine: allocates its blocks, prefills its prompt, draws its first token.

A group whose blocks are allocated is prefilled at once, or a chunk a step while other requests decode. Requests with a
common prefix share its blocks (see `illava.engine.prefix_sharing`), and its snapshot of recurrent layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from illava.decoder.decoder import Decoder
from illava.decoder.kv_cache import PagedCache
from illava.decoder.prefill import Prefill, PrefillRun
from illava.engine.batching import (
    Draw,
    Outcome,
    run_with_fallback,
    sample_next_token,
    sampling_of,
    take_batch,
    to_outcomes,
)
from illava.engine.prefix_sharing import cached_prefix, common_prefix_len, snapshot_len
from illava.engine.prompt import join_trace, pack
from illava.engine.request_state import RequestState
from illava.errors import ILLaVAError
from illava.reduction.probe import AttentionProbe


class PrefillPhase:
    """Prefills groups of requests, one group at a time.

    Args:
        decoder: the model's decoder.
        cache: its pool of blocks.
        max_tokens: prompt tokens of a group, unless a single request has more.
        max_chunk_tokens: prompt tokens of a call while other requests decode.
        draw: draws the first tokens from the logits.
        probe: is given the decoder's attention.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedCache,
        *,
        max_tokens: int,
        max_chunk_tokens: int,
        draw: Draw = sample_next_token,
        probe: AttentionProbe | None = None,
    ) -> None:
        self._decoder, self._cache, self._draw, self._probe = decoder, cache, draw, probe
        self._max_tokens, self._max_chunk_tokens = max_tokens, max_chunk_tokens
        self._group: list[RequestState] = []
        self._run: PrefillRun | None = None

    def choose(
        self, encoded: Iterable[RequestState], running: Sequence[RequestState], capacity: int
    ) -> list[RequestState]:
        """Return the group that is being prefilled; if there is none, choose the next one and allocate its blocks.

        A request that shares a prefix with another request of the group waits until that request runs and its blocks
        can be shared.
        """
        if not self._group:
            self._group = self._admit(encoded, running, capacity)
        return self._group

    def fills_pool(self, encoded: Iterable[RequestState]) -> bool:
        """Whether what is encoded and waits for blocks would fill the pool: then no more features should be held."""
        waiting = (state for state in encoded if state not in self._group)
        needed = sum(self._cache.num_blocks_for(state.reserved) for state in waiting)
        return needed > self._cache.num_free_blocks

    def drop(self) -> None:
        """Forget the group that is being prefilled; the caller frees its requests' blocks."""
        self._group, self._run = [], None

    def advance(self, *, decoding: bool) -> list[Outcome] | None:
        """Prefill the chosen group further; returns its outcomes, or None while chunks are left."""
        group = self._group
        try:
            self._run = self._run or self._begin(group)
            done = self._run.advance(self._max_chunk_tokens if decoding else None)
            outcomes = None if done is None else self._prefilled(done, group)
        except ILLaVAError:
            outcomes = run_with_fallback(self._whole, group)
        if outcomes is not None:
            self.drop()
        return outcomes

    def _admit(
        self, encoded: Iterable[RequestState], running: Sequence[RequestState], capacity: int
    ) -> list[RequestState]:
        group, waiting = list[RequestState](), list(encoded)
        for state in take_batch(waiting, capacity, self._max_tokens, lambda state: state.prompt.num_tokens):
            donor = max(running, key=lambda other: self._common_prefix_len(state, other), default=state)
            num_computed = self._common_prefix_len(state, donor) if running else 0
            if any(self._common_prefix_len(state, other) > num_computed for other in group):
                continue
            nothing = [0] * self._decoder.num_layers
            prefix_lengths, mm_item = cached_prefix(donor, num_computed) if num_computed else (nothing, nothing)
            if not self._cache.has_room(state.reserved, prefix_lengths):
                break
            state.snapshot_len = donor.snapshot_len if num_computed else self._new_snapshot(state, waiting)
            takes_snapshot = state.snapshot_len and not num_computed
            self._cache.admit(
                state.request_id,
                state.reserved,
                prefix_from=donor.request_id if num_computed else None,
                prefix_lengths=prefix_lengths,
                num_behind=state.prompt.num_tokens - state.snapshot_len if takes_snapshot else None,
            )
            state.num_computed, state.computed_by_layer = num_computed, (prefix_lengths, mm_item)
            group.append(state)
        return group

    def _common_prefix_len(self, state: RequestState, other: RequestState) -> int:
        """Tokens of the prefix that ``state`` may take of ``other``, without its last token, which has to be computed.

        Returns 0 with a probe, since a probe needs whole prompts. Of a recurrent layer nothing less than a whole
        snapshot can be taken.
        """
        if self._probe is not None:
            return 0
        common = min(common_prefix_len(state, other), state.prompt.num_tokens - 1)
        if self._cache.states is None:
            return common
        return other.snapshot_len if other.snapshot_len <= common else 0

    def _new_snapshot(self, state: RequestState, waiting: Sequence[RequestState]) -> int:
        """Behind how many tokens a snapshot is taken for the requests that wait for this one: as many as all share.

        Returns 0 where nobody waits, there are no recurrent layers, or no state is free beside the request's own.
        """
        if self._probe is not None or self._cache.states is None or self._cache.states.num_free < 2:
            return 0
        return min(filter(None, (snapshot_len(state, other) for other in waiting if other is not state)), default=0)

    def _whole(self, group: Sequence[RequestState]) -> list[Outcome]:
        done = self._begin(group).advance()
        if done is None:
            raise RuntimeError("a prefill without a budget stopped early")
        return self._prefilled(done, group)

    def _begin(self, group: Sequence[RequestState]) -> PrefillRun:
        empty = [[0] * self._decoder.num_layers] * len(group)
        return PrefillRun(
            self._decoder,
            pack([state.prompt.after(state.num_computed) for state in group]),
            group[0].plan,
            self._cache,
            self._cache.batch([state.request_id for state in group], empty),
            seeds=[state.decoder_seed for state in group],
            traced=[row for row, state in enumerate(group) if state.request.trace],
            num_computed=[state.computed_by_layer[0] for state in group],
            probe=self._probe,
        )

    def _prefilled(self, done: Prefill, group: Sequence[RequestState]) -> list[Outcome]:
        sampling = sampling_of(group, self._decoder.device, first=True)
        outcomes = to_outcomes(self._draw(done.logits_BV, sampling, group).cpu(), group)
        for row, state in enumerate(group):
            num_computed, mm_item = state.computed_by_layer
            state.lengths = [n + lengths[row] for n, lengths in zip(num_computed, done.lengths_LB, strict=True)]
            state.num_visual = [n + counts[row] for n, counts in zip(mm_item, done.num_visual_LB, strict=True)]
            state.num_biased = [n if state.prompt.size_T is not None else 0 for n in state.lengths]
            state.next_position_P = state.prompt.next_position_P
            self._cache.trim(state.request_id, [n + state.request.sampling.max_new_tokens for n in state.lengths])
            if row in done.traces:
                state.trace = join_trace(state.encoded, state.prompt, done.traces[row])
            outcomes[row] = done.errors.get(row, outcomes[row])
        return outcomes

"""Runs the first phase of a request in the engine: encodes its media, and assembles its prompt from visual tokens.

Equal media of a group are encoded once. While the device encodes a group, the next group's pixels are copied to it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import islice

from illava.decoder.kv_cache import PagedCache
from illava.engine.batching import Outcome, take_batch
from illava.engine.media_phase import MediaPhase
from illava.engine.prefix_sharing import MediaDedupCache, encode_once, mm_keys, prefix
from illava.engine.prompt import assemble
from illava.engine.request_state import RequestState
from illava.errors import CacheTooSmallError, RequestError
from illava.families.base import Family
from illava.preprocess import VisualInput
from illava.reduction.probe import AttentionProbe
from illava.reduction.scopes import planned_lengths


class EncodePhase:
    """Encodes groups of requests.

    Args:
        family: the loaded model.
        media_phase: applies stage ``media`` of the plans.
        dedup: the media in flight; what stage ``media`` leaves of equal media is interned as well.
        cache: the pool that an assembled prompt must fit into.
        max_patches: patches of one tower call, unless a single request has more.
        max_companions: requests taken beyond the capacity, since their media are encoded for others.
        probe: is given the tower's attention.
    """

    def __init__(
        self,
        family: Family,
        media_phase: MediaPhase,
        dedup: MediaDedupCache,
        cache: PagedCache,
        *,
        max_patches: int,
        max_companions: int,
        probe: AttentionProbe | None = None,
    ) -> None:
        self._family, self._media_phase, self._dedup, self._cache = family, media_phase, dedup, cache
        self._max_patches, self._max_companions, self._probe = max_patches, max_companions, probe
        self._next: list[RequestState] = []

    def choose(self, waiting: Iterable[RequestState], capacity: int) -> list[RequestState]:
        """Choose the next group; a visual input that several requests share counts once.

        Requests about the same media join the group beyond its capacity, since their media are encoded for it.
        """
        waiting = list(waiting)
        seen: set[Hashable] = set()

        def new_patches(state: RequestState) -> int:
            if state.request.encoding is not None:
                return 0
            new = {key: n for n, key in enumerate(mm_keys(state)) if key not in seen}
            seen.update(new)
            return sum(self._family.num_patches(state.media[n]) for n in new.values())

        group = take_batch(waiting, capacity, self._max_patches, new_patches)
        group += self._companions(group, waiting)
        chosen = {state.request_id for state in group}
        left = (state for state in waiting if state.request_id not in chosen)
        self._next = take_batch(left, capacity, self._max_patches, new_patches)
        return group

    def _companions(self, group: Sequence[RequestState], waiting: Sequence[RequestState]) -> list[RequestState]:
        """Waiting requests whose media are all among the group's."""
        if not group:
            return []
        head, keys = group[0], {key for state in group for key in mm_keys(state)}
        same_plan = (
            state for state in waiting if state.plan == head.plan and state.request.trace == head.request.trace
        )
        served = (
            state for state in same_plan if state not in group and state.media and keys.issuperset(mm_keys(state))
        )
        return list(islice(served, self._max_companions))

    def run(self, group: Sequence[RequestState]) -> list[Outcome]:
        """Apply stage ``media``, run tower, projector and layout in packed calls, assemble each request's prompt."""
        seen = [state for state in group if state.request.encoding is None]
        for state in seen:
            state.show(self._dedup.intern(self._media_phase.apply(state.request, state.plan)))
        for state, encoded in zip(seen, encode_once(self._family, seen, self._probe) if seen else (), strict=True):
            state.encoded = encoded
        if self._next:
            self._family.prefetch([mm_item for state in self._next for mm_item in _as_they_are(state)])
            self._next = []
        for state in group:
            if state.request.encoding is not None:
                state.take_encoding()
        return [self._assemble(state) for state in group]

    def _assemble(self, state: RequestState) -> Outcome:
        seen = state.encoded if state.request.encoding is None else []  # by the tower, for this request
        state.num_patches = sum(mm_item.num_patches for mm_item in seen)
        state.num_patches_kept = sum(mm_item.num_patches_kept for mm_item in seen)
        try:
            state.prompt = assemble(self._family, state.shown, state.encoded)
        except RequestError as error:
            return error
        state.prefix = prefix(state)
        lengths = planned_lengths(state.prompt.token_spans, state.plan, self._family.decoder.num_layers)
        state.reserved = [n + state.request.sampling.max_new_tokens for n in lengths]
        needed = self._cache.num_blocks_for(state.reserved)
        if needed > self._cache.num_blocks:
            return CacheTooSmallError(
                f"request {state.request_id!r} needs {needed} key/value blocks, the whole pool has "
                f"{self._cache.num_blocks}; raise kv_cache_bytes, send fewer frames, or lower max_new_tokens"
            )
        return None


def _as_they_are(state: RequestState) -> Sequence[VisualInput]:
    """The media that the tower will see of a waiting request; none where stage ``media`` may change them first."""
    changed = state.request.encoding is not None or state.plan.at("media") is not None
    return () if changed else state.media

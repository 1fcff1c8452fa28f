"""Joins the paged cache of the attention layers and the states of the recurrent layers of one decoder.

Whoever admits, trims and frees requests speaks of all layers; the blocks of those that keep keys and values come from
the pool of `illava.decoder.kv_cache`, the others' states from `illava.decoder.recurrent_state`. A request holds both or
neither. `make_cache` builds the cache that a decoder needs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from illava.decoder.decoder import Decoder
from illava.decoder.kv_cache import BatchBlockTables, PagedCache
from illava.decoder.recurrent_state import RecurrentStates
from illava.decoder.state_shape import num_state_slots
from illava.errors import ModelLoadError


class HybridCache(PagedCache):
    """Holds blocks for some layers, and a state for the others; counts by layer are of all layers.

    Args:
        kv_layers: the layers that keep keys and values, ascending.
        states: of the other layers.
        num_kv_heads, head_dim, num_blocks, block_size, dtype, device: as `PagedCache`.
    """

    states: RecurrentStates

    def __init__(
        self,
        *,
        kv_layers: Sequence[int],
        states: RecurrentStates,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(
            num_layers=len(kv_layers),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=device,
        )
        self.states, self._kv_layers = states, tuple(kv_layers)

    def num_blocks_for(self, lengths: Sequence[int]) -> int:
        """See `PagedCache.num_blocks_for`."""
        return super().num_blocks_for(self._kept(lengths))

    def has_room(self, lengths: Sequence[int], prefix_lengths: Sequence[int] = ()) -> bool:
        """See `PagedCache.has_room`; a free state is needed, too."""
        return self.states.num_free > 0 and super().has_room(lengths, self._kept(prefix_lengths))

    def admit(
        self,
        request_id: Hashable,
        lengths: Sequence[int],
        *,
        prefix_from: Hashable | None = None,
        prefix_lengths: Sequence[int] = (),
        num_behind: int | None = None,
    ) -> None:
        """See `PagedCache.admit` and `RecurrentStates.admit`."""
        if self.states.num_free < 1 + (num_behind is not None):
            raise MemoryError(f"request {request_id!r} needs a recurrent state; {self.states.num_free} are free")
        kept = self._kept(prefix_lengths)
        super().admit(request_id, self._kept(lengths), prefix_from=prefix_from, prefix_lengths=kept)
        self.states.admit(request_id, prefix_from=prefix_from, num_behind=num_behind)

    def trim(self, request_id: Hashable, lengths: Sequence[int]) -> None:
        """See `PagedCache.trim`; a state has one size."""
        super().trim(request_id, self._kept(lengths))

    def free(self, request_id: Hashable) -> None:
        """See `PagedCache.free`."""
        super().free(request_id)
        self.states.free(request_id)

    def batch(
        self,
        request_ids: Sequence[Hashable],
        lengths: Sequence[Sequence[int]],
        num_biased: Sequence[Sequence[int]] = (),
    ) -> BatchBlockTables:
        """See `PagedCache.batch`; a layer's row is its number among those that keep keys."""
        biased = [self._kept(own) for own in num_biased]
        tables = super().batch(request_ids, [self._kept(own) for own in lengths], biased)
        return replace(tables, states=self.states.rows(request_ids))

    def check(self) -> None:
        """See `PagedCache.check` and `RecurrentStates.check`."""
        super().check()
        self.states.check()

    def _kept(self, by_layer: Sequence[int]) -> list[int]:
        return [by_layer[layer] for layer in self._kv_layers] if by_layer else []


def make_cache(decoder: Decoder, *, pool_bytes: int, block_size: int, max_requests: int) -> PagedCache:
    """Build the cache of a decoder within so many bytes.

    Args:
        decoder: its layers decide what is kept.
        pool_bytes: of keys, values and states together.
        block_size: tokens of a block.
        max_requests: running at a time.

    Raises:
        ModelLoadError: that is too little for one token of one request.
    """
    num_kv_layers, shape = len(decoder.kv_layers), decoder.state_shape
    block_bytes = 2 * block_size * decoder.num_kv_heads * decoder.head_dim * decoder.dtype.itemsize
    state_bytes = 0 if shape is None else shape.num_bytes(decoder.dtype.itemsize)
    num_states = num_state_slots(pool_bytes, state_bytes, max_requests=max_requests)
    num_blocks = (pool_bytes - num_states * state_bytes) // block_bytes
    if num_blocks < num_kv_layers or (shape is not None and not num_states):
        more = f", and a request a recurrent state of {state_bytes} bytes in half of the pool" if state_bytes else ""
        raise ModelLoadError(
            f"a key/value pool of {pool_bytes} bytes holds {num_blocks} blocks of {block_bytes} bytes; one token "
            f"needs {num_kv_layers}, a block in each layer{more}: raise kv_cache_bytes, or free memory on the device"
        )
    if shape is None:
        return PagedCache(
            num_layers=num_kv_layers,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=decoder.dtype,
            device=decoder.device,
        )
    return HybridCache(
        kv_layers=decoder.kv_layers,
        states=RecurrentStates(shape, num_states, dtype=decoder.dtype, device=decoder.device),
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=decoder.dtype,
        device=decoder.device,
    )

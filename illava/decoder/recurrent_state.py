"""Stores the states of recurrent layers beside the paged cache: a slot a request, and slots for snapshots of prefixes.

A recurrent layer keeps no keys: all it knows of the tokens so far is a state of fixed size. So a request takes one slot
for its whole life when it is admitted. A state cannot be cut back to a prefix. A request whose prefix others share
therefore takes a second slot, for a snapshot: the state behind that prefix. Nobody writes to a snapshot again; it is
freed when the last request that shares it has ended.

Shape suffixes: L recurrent layers, S slots, B requests, C convolved channels, W inputs that the convolution looks back
on, H value heads, k key width, v value width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava.decoder.state_shape import StateShape
from illava.host_copies import on_device

_NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class StateRows:
    """Where the states of a batch of requests lie.

    Attributes:
        slot_B: int64 slots, on the device.
        slots: the same on the host.
        snapshots: the slot of each request's snapshot, -1 for none.
        num_behind: tokens of each prompt behind its snapshot.
    """

    slot_B: Tensor
    slots: tuple[int, ...] = ()
    snapshots: tuple[int, ...] = ()
    num_behind: tuple[int, ...] = ()

    def places(self, lengths: Sequence[int], num_computed: Sequence[int]) -> list[int | None]:
        """Before which of its ``lengths`` tokens each request's snapshot is to be taken; None for no request's.

        A request that goes on behind a prefix, ``num_computed`` tokens, has that prefix's snapshot already.
        """
        rows = zip(lengths, num_computed, self.snapshots, self.num_behind, strict=True)
        return [None if slot == _NO_SLOT or computed else n - behind for n, computed, slot, behind in rows]


class RecurrentStates:
    """Holds the pools of states, and the slots of every request.

    Args:
        shape: of one request's states.
        num_states: size of the pools.
        dtype: of the convolution's inputs.
        device: where the pools are.

    Attributes:
        conv_LSCW: the convolution's newest inputs.
        state_LSHkv: float32 state matrices.
    """

    def __init__(self, shape: StateShape, num_states: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.num_states = shape, num_states
        rows = (shape.num_layers, num_states + 1)  # the last slot is of rows that fill a bucket: nobody reads it
        self.conv_LSCW = torch.zeros(*rows, shape.num_channels, shape.look_back, dtype=dtype, device=device)
        matrix = (shape.num_heads, shape.key_width, shape.value_width)
        self.state_LSHkv = torch.zeros(*rows, *matrix, dtype=torch.float32, device=device)
        self._free = list(range(num_states))[::-1]
        self._slot_of: dict[Hashable, int] = {}
        self._snapshot_of: dict[Hashable, tuple[int, int]] = {}  # its slot, and the tokens of the prompt behind it
        self._ref_count: Counter[int] = Counter()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def null_slot(self) -> int:
        return self.num_states

    def admit(
        self, request_id: Hashable, *, prefix_from: Hashable | None = None, num_behind: int | None = None
    ) -> None:
        """Take a slot for a request; `begin` gives it its first state.

        Args:
            request_id: the request that takes it.
            prefix_from: another request, whose snapshot this one begins from, and shares.
            num_behind: tokens at the prompt's end that others will not share: a slot more, for the snapshot of what
                comes before them. None takes none.

        Raises:
            MemoryError: fewer slots are free; ask `num_free` first.
        """
        needed = 1 + (num_behind is not None)
        if needed > self.num_free:
            raise MemoryError(f"request {request_id!r} needs {needed} recurrent states, {self.num_free} are free")
        self._slot_of[request_id] = self._free.pop()
        if prefix_from is not None:
            self._snapshot_of[request_id] = self._snapshot_of[prefix_from]
        elif num_behind is not None:
            self._snapshot_of[request_id] = self._free.pop(), num_behind
        if request_id in self._snapshot_of:
            self._ref_count[self._snapshot_of[request_id][0]] += 1

    def free(self, request_id: Hashable) -> None:
        """Free a request's slot, and its snapshot where no other request shares it."""
        slot, (snapshot, _) = self._slot_of.pop(request_id, None), self._snapshot_of.pop(request_id, (_NO_SLOT, 0))
        if slot is not None:
            self._free.append(slot)
        if snapshot != _NO_SLOT:
            self._ref_count[snapshot] -= 1
            if not self._ref_count[snapshot]:
                del self._ref_count[snapshot]
                self._free.append(snapshot)

    def rows(self, request_ids: Sequence[Hashable]) -> StateRows:
        """Where the states of a batch lie."""
        slots = tuple(self._slot_of[request_id] for request_id in request_ids)
        snapshots = [self._snapshot_of.get(request_id, (_NO_SLOT, 0)) for request_id in request_ids]
        slot_B = on_device(slots, self.state_LSHkv.device, torch.long)
        return StateRows(slot_B, slots, tuple(slot for slot, _ in snapshots), tuple(n for _, n in snapshots))

    def begin(self, rows: StateRows, num_computed: Sequence[int]) -> None:
        """Give each request the state that its prefill begins with: its prefix's snapshot, or nothing."""
        for slot, snapshot, computed in zip(rows.slots, rows.snapshots, num_computed, strict=True):
            for pool_LS in (self.conv_LSCW, self.state_LSHkv):
                if computed:
                    pool_LS[:, slot] = pool_LS[:, snapshot]
                else:
                    pool_LS[:, slot] = 0

    def keep(self, layer: int, rows: StateRows, row: int) -> None:
        """Copy a layer's present state of one request to its snapshot."""
        for pool_LS in (self.conv_LSCW, self.state_LSHkv):
            pool_LS[layer, rows.snapshots[row]] = pool_LS[layer, rows.slots[row]]

    def check(self) -> None:
        """Check that every slot is free, a request's, or a snapshot's as often as it is shared.

        Raises:
            RuntimeError: how many slots are accounted for.
        """
        shared = Counter(slot for slot, _ in self._snapshot_of.values())
        found = sorted([*self._free, *self._slot_of.values(), *shared])
        if found != list(range(self.num_states)) or shared != self._ref_count:
            raise RuntimeError(f"{len(set(found))} of {self.num_states} recurrent states accounted for in {len(found)}")

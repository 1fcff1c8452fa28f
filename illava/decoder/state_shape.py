"""`StateShape`: what the recurrent layers of a model keep of one request. Torch-free: a dry run counts it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StateShape:
    """The sizes of one recurrent layer's state of one request.

    Attributes:
        num_layers: recurrent layers of the model.
        num_channels: that the short convolution runs over.
        look_back: inputs that the convolution keeps: its width less one.
        num_heads, key_width, value_width: of the state matrices.
    """

    num_layers: int
    num_channels: int
    look_back: int
    num_heads: int
    key_width: int
    value_width: int

    def num_bytes(self, itemsize: int) -> int:
        """Bytes of all layers' states of one request: matrices in float32, inputs of the convolution as they are."""
        matrices = self.num_heads * self.key_width * self.value_width * 4
        return self.num_layers * (matrices + self.num_channels * self.look_back * itemsize)


def num_state_slots(pool_bytes: int, state_bytes: int, *, max_requests: int) -> int:
    """States that a pool has room for: one a running request and one for a snapshot each, in half of it at most."""
    return min(2 * max_requests, pool_bytes // 2 // state_bytes) if state_bytes else 0

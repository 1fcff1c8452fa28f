"""`HybridLayers`: which layers of a decoder attend and which are recurrent, and what the latter keep. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from illava.decoder.state_shape import StateShape


@dataclass(frozen=True, slots=True)
class HybridLayers:
    """Holds what a dry run must know of a decoder whose layers are not all alike.

    Attributes:
        attention_layers: the layers that keep keys and values, ascending; all, where none is recurrent.
        state_shape: of the recurrent layers' states; None where none is.
    """

    attention_layers: tuple[int, ...]
    state_shape: StateShape | None = None

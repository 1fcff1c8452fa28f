"""Defines the probe of attention: towers and prefills call it with every layer's scores while a model answers.

Shape suffixes: T visual tokens in packed order.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from illava.reducers import Stage


class AttentionProbe(Protocol):
    """Is called once a layer. A prefill with a probe runs layer by layer over whole prompts, so it is slower."""

    def __call__(self, stage: Stage, layer: int, score_T: Tensor, /) -> None:
        """Take one layer's attention.

        Args:
            stage: ``vision_block`` or ``decoder_layer``.
            layer: 0-based.
            score_T: in the tower attention received; in the decoder the last prompt token's attention.
        """

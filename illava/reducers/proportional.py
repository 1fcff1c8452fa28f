"""Offers proportional attention as a key of the methods that merge tokens; those published without it stay so."""

from __future__ import annotations

from pydantic import BaseModel


class ProportionalAttention(BaseModel):
    """Weighs merged tokens by their sizes in the tower's later attention.

    Attributes:
        proportional_attention: every block of the tower behind this one adds the log of a token's size to the scores of
            its key, so that a merged token weighs as much as the patches it is made of; all exact scores measured there
            follow. In ``vision_block`` only.

    Source: ToMe's (arXiv 2210.09461, eq. 1), an option of ours for the other methods.
    """

    proportional_attention: bool = False

    @property
    def biases_attention(self) -> bool:
        return self.proportional_attention

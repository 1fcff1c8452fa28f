"""What a tower hands to the decoder: a medium's visual tokens, and the host's count of what a prompt is made of.

Towers and families make these records, prompts and decoders read them. Plain frozen data.

Shape suffixes: K visual tokens of a medium, P patches, D channels of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from illava.requests import TraceStep


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Consecutive prompt tokens of one kind; host integers only.

    Attributes:
        length: tokens.
        visual: index of the request's medium, -1 for text.
        span: index of the contiguous stretch of visual tokens, -1 for text.
        frame: the frame these tokens belong to where the run is exactly one frame's tokens, else -1.
    """

    length: int
    mm_index: int = -1
    visual_span: int = -1
    frame: int = -1


@dataclass(frozen=True, slots=True)
class EncodedVisual:
    """One medium after tower, projector and layout: what the LLM will read. K tokens at LLM width D.

    Attributes:
        feature_KD: visual tokens, separators (newlines) included.
        placeholder_K: int64 ascending: which of the medium's ``num_placeholders`` prompt places each token takes. In
            the geometric layout slots are those of the unreduced model, so survivors keep their position ids and leave
            gaps; in the released layout they are 0 .. K - 1.
        num_placeholders: prompt places of this medium.
        frame_counts: host integers: tokens of each frame or tile in order, where the layout keeps frames apart, as
            (frame, count); separators between or behind frames carry frame -1. Counts sum to K.
        coord_K3: int64 (frame or tile, row, col) after the layout; separators carry row = col = -1.
        score_K: float32, attention received in the tower's last block carried through the same layout; present where
            the plan reduces at ``decoder_input``.
        num_patches: tokens this medium brought into the tower.
        trace: this medium's steps, empty unless asked for. Places carry medium 0; the engine renumbers them.
        patch_coord_P4: int64, where traced.
        noop_steps: steps of the tower, in words, that found nothing to take from this medium; see
            `illava.engine.prompt`.
        deepstack: visual features [K, D] that are added to these tokens behind decoder layer 0, 1, ...; mostly none.
    """

    feature_KD: Tensor
    placeholder_K: Tensor
    num_placeholders: int
    frame_counts: tuple[tuple[int, int], ...]
    coord_K3: Tensor
    score_K: Tensor | None
    num_patches: int
    trace: tuple[TraceStep, ...] = ()
    patch_coord_P4: Tensor | None = None
    deepstack: tuple[Tensor, ...] = ()
    noop_steps: tuple[str, ...] = ()

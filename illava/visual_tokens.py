"""Defines the records that a tower hands to the decoder: encoded visual inputs, and spans of prompt tokens.

Towers and families make these records; prompts and decoders read them.

Shape suffixes: K visual tokens of one visual input, P patches, D channels of the language model.
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
        mm_index: index of the request's visual input, -1 for text.
        visual_span: index of the contiguous span of visual tokens without text between, -1 for text; the scope
            ``per: span``.
        frame: the frame, if these are exactly the tokens of one frame, else -1.
    """

    length: int
    mm_index: int = -1
    visual_span: int = -1
    frame: int = -1


@dataclass(frozen=True, slots=True)
class EncodedVisual:
    """One visual input after tower, projector and layout, as the LLM will read it: K tokens of LLM width D.

    Attributes:
        feature_KD: visual tokens, separators (newlines) included.
        placeholder_K: int64 ascending: the placeholder token, of ``num_placeholders``, that each visual token replaces.
            In the geometric layout placeholders are those of the unreduced model, so kept tokens keep their position
            ids and leave gaps; in the released layout they are 0 .. K - 1.
        num_placeholders: placeholder tokens of this input in the prompt.
        frame_counts: host integers: tokens of each frame or tile in order, where the layout keeps frames apart, as
            (frame, count); separators between or behind frames have frame -1. Counts sum to K.
        coord_K3: int64 (frame or tile, row, col) after the layout; separators have row = col = -1.
        score_K: float32, attention received in the tower's last block, passed through the same layout; present where
            the plan reduces at ``decoder_input``.
        size_K: float32, how many visual tokens of the unreduced model each token stands for; present where the plan has
            ``size_bias``.
        num_patches: tokens that entered the tower.
        num_patches_kept: tokens that left it.
        trace: the steps, empty unless asked for. Coordinates name input 0; the engine renumbers them.
        patch_coord_P4: int64, where traced.
        noop_steps: steps of the tower, in words, that removed nothing from this input; see `illava.engine.prompt`.
        deepstack: visual features [K, D] that are added to these tokens behind decoder layer 0, 1, ...; mostly none.
    """

    feature_KD: Tensor
    placeholder_K: Tensor
    num_placeholders: int
    frame_counts: tuple[tuple[int, int], ...]
    coord_K3: Tensor
    score_K: Tensor | None
    num_patches: int
    num_patches_kept: int
    trace: tuple[TraceStep, ...] = ()
    patch_coord_P4: Tensor | None = None
    deepstack: tuple[Tensor, ...] = ()
    noop_steps: tuple[str, ...] = ()
    size_K: Tensor | None = None

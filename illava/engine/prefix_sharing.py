"""What requests have in common, so that it is computed once: equal media, and equal beginnings of prompts.

Media are equal by content, compared byte for byte, whoever loaded them. Their encoding is shared by requests of one
group (one plan), unless a reducer draws in the tower or compares pictures with the question: then each request's own
seed or text decides. Prompts that begin alike hold equal keys and values there as long as nothing in the decoder looks
at what follows: that is so without decoder steps, and with steps whose scores the question does not enter. Knows the
family's interface; nothing of layers, pages or scheduling.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import takewhile
from weakref import WeakValueDictionary

import numpy as np

from illava.engine.prompt import TextSpan
from illava.engine.request_state import RequestState
from illava.families.base import Family
from illava.preprocess import VisualInput
from illava.reduction.probe import AttentionProbe
from illava.requests import Request
from illava.visual_tokens import EncodedVisual

_IN_TOWER = ("media", "vision_block", "vision_output")
_IN_DECODER = ("decoder_input", "decoder_layer")
_OF_VISUAL_TOKENS = frozenset({"attention_received", "causal_normalised_attention", "keys", "sizes"})  # of their scope


class MediaDedupCache:
    """The arrays of all media in flight, so that equal ones become one array; forgets what nobody holds any more."""

    def __init__(self) -> None:
        self._arrays: WeakValueDictionary[Hashable, np.ndarray] = WeakValueDictionary()

    def intern(self, request: Request) -> Request:
        """The request, its media replaced by equal ones in flight."""
        content = tuple(self._known(part) if isinstance(part, VisualInput) else part for part in request.content)
        return replace(request, content=content)

    def _known(self, visual: VisualInput) -> VisualInput:
        # A sixteenth of rows and columns finds the candidate; only a candidate is compared in full.
        tiles = self._same(visual.tiles, visual.tiles[:, ::16, ::16])
        representative = (
            None if visual.representative is None else self._same(visual.representative, visual.representative)
        )
        return replace(visual, tiles=tiles, representative=representative)

    def _same(self, array: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """The equal array that is known already, or this one."""
        key = (array.shape, array.dtype.str, zlib.crc32(np.ascontiguousarray(sample).data))
        known = self._arrays.setdefault(key, array)
        return known if known is array or np.array_equal(known, array) else array


def visual_keys(live: RequestState) -> list[Hashable]:
    """A key for each medium of a request, the same where one encoding serves; valid while the media are alive."""
    drawn = any("seed" in step.reducer.evidence(step.stage) for step in live.plan.steps if step.stage in _IN_TOWER)
    seeds = live.visual_seeds if drawn else (0,) * len(live.media)
    reducer = live.plan.at("media")
    compared = reducer is not None and reducer.text_scorer is not None
    text = tuple(part for part in live.request.content if isinstance(part, str)) if compared else ()
    return [
        (
            id(visual.tiles),
            id(visual.representative),
            visual.kind,
            visual.original_size,
            visual.timestamps_s,
            seed,
            text,
        )
        for visual, seed in zip(live.media, seeds, strict=True)
    ]


def patches_per_request(family: Family, group: Sequence[RequestState]) -> list[float]:
    """Patches that each request brings into the tower: what n requests share counts 1 / n for each."""
    keys = [visual_keys(live) for live in group]
    sharers = Counter(key for own in keys for key in own)
    return [
        sum(family.num_patches(visual) / sharers[key] for visual, key in zip(live.media, own, strict=True))
        for live, own in zip(group, keys, strict=True)
    ]


def encode_once(
    family: Family, group: Sequence[RequestState], probe: AttentionProbe | None = None
) -> list[list[EncodedVisual]]:
    """Tower, projector and layout of a group's distinct media in packed calls; each request's, in its order."""
    place: dict[Hashable, int] = {}
    media: list[VisualInput] = []
    seeds: list[int] = []
    keys = [visual_keys(live) for live in group]
    for live, own in zip(group, keys, strict=True):
        for key, visual, seed in zip(own, live.media, live.visual_seeds, strict=True):
            if key not in place:
                place[key] = len(media)
                media.append(visual)
                seeds.append(seed)
    encoded = family.encode(media, group[0].plan, trace=group[0].request.trace, seeds=seeds, probe=probe)
    return [[encoded[place[key]] for key in own] for own in keys]


def prefix(live: RequestState) -> list[tuple[Hashable, int]]:
    """An assembled prompt, piece by piece: ids of a text or key of a part of a medium, and its number of tokens."""
    keys = visual_keys(live)
    return [
        (piece if isinstance(piece, TextSpan) else (keys[piece.visual], piece.part), length)
        for piece, length in live.prompt.pieces
    ]


def common_prefix_len(one: RequestState, other: RequestState) -> int:
    """Leading tokens, as assembled, whose keys and values two requests have in common in every layer.

    0 where no medium is among them: a system prompt is not worth a wait. 0 where the plan acts in the decoder, unless
    it looks at visual tokens alone and all of them are among the common ones: then it leaves the same of both.
    """
    if one.plan != other.plan:
        return 0
    common, pairs = 0, list(zip(one.prefix, other.prefix, strict=False))
    num_equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    common = sum(length for _, length in one.prefix[:num_equal])
    if not any(_is_visual(piece) for piece, _ in one.prefix[:num_equal]):
        return 0
    steps = [step for step in one.plan.steps if step.stage in _IN_DECODER]
    if steps:
        blind = all(step.reducer.evidence(step.stage) <= _OF_VISUAL_TOKENS for step in steps)
        rest = one.prefix[num_equal:] + other.prefix[num_equal:]
        if not blind or one.request.trace or any(_is_visual(piece) for piece, _ in rest):
            return 0
    if num_equal < len(pairs):
        (piece, _), (other_piece, _) = pairs[num_equal]
        if isinstance(piece, TextSpan) and isinstance(other_piece, TextSpan):
            ids = zip(piece.token_ids, other_piece.token_ids, strict=False)
            common += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ids))
    return common


def cached_prefix(other: RequestState, common: int) -> tuple[list[int], list[int]]:
    """What a prefilled request holds of its first ``common`` tokens as assembled: tokens, and visual ones, by layer.

    What follows them was not reduced: see `common_prefix_len`.
    """
    behind, visual_behind = -common, 0
    for piece, length in other.prefix:
        behind += length
        visual_behind += max(0, min(behind, length)) if _is_visual(piece) else 0
    return [n - behind for n in other.lengths], [n - visual_behind for n in other.num_visual]


def _is_visual(piece: Hashable) -> bool:
    return not isinstance(piece, TextSpan)

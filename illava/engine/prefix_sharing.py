"""Finds what requests have in common, so that it is computed once: equal media, and common prefixes of prompts.

Media are equal by content, compared byte for byte, whoever loaded them. Requests of one group (one plan) share their
encoding, unless a reducer draws in the tower or compares pictures with the question: then each request's own seed or
text decides. A common prefix has equal keys and values as long as no decoder step looks at the tokens behind it. That
holds without decoder steps, and for steps whose scores do not depend on the question.
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
    """Interns the arrays of all media in flight: equal arrays become one; an array that nobody uses is forgotten."""

    def __init__(self) -> None:
        self._arrays: WeakValueDictionary[Hashable, np.ndarray] = WeakValueDictionary()

    def intern(self, request: Request) -> Request:
        """Replace the request's media by equal media in flight."""
        return request.map_media(self._known)

    def _known(self, mm_item: VisualInput) -> VisualInput:
        # A sixteenth of rows and columns finds the candidate; only a candidate is compared in full.
        tiles = self._same(mm_item.tiles, mm_item.tiles[:, ::16, ::16])
        representative = (
            None if mm_item.representative is None else self._same(mm_item.representative, mm_item.representative)
        )
        return replace(mm_item, tiles=tiles, representative=representative)

    def _same(self, array: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """The equal array in flight if there is one, else this array."""
        key = (array.shape, array.dtype.str, zlib.crc32(np.ascontiguousarray(sample).data))
        known = self._arrays.setdefault(key, array)
        return known if known is array or np.array_equal(known, array) else array


def mm_keys(state: RequestState) -> list[Hashable]:
    """A key for each visual input of a request; inputs of one key share one encoding. Valid while the media live."""
    drawn = any("seed" in step.reducer.evidence(step.stage) for step in state.plan.steps if step.stage in _IN_TOWER)
    seeds = state.mm_seeds if drawn else (0,) * len(state.media)
    reducer = state.plan.at("media")
    compared = reducer is not None and reducer.text_scorer is not None
    text = state.request.text_beside_media if compared else ()
    return [
        (
            id(mm_item.tiles),
            id(mm_item.representative),
            mm_item.kind,
            mm_item.original_size,
            mm_item.timestamps_s,
            seed,
            text,
        )
        for mm_item, seed in zip(state.media, seeds, strict=True)
    ]


def patches_per_request(family: Family, group: Sequence[RequestState]) -> list[float]:
    """Patches that enter the tower for each request; patches that n requests share count 1 / n for each."""
    keys = [mm_keys(state) if state.request.encoding is None else [] for state in group]
    sharers = Counter(key for own in keys for key in own)
    return [
        sum(family.num_patches(mm_item) / sharers[key] for mm_item, key in zip(state.media, own, strict=bool(own)))
        for state, own in zip(group, keys, strict=True)
    ]


def encode_once(
    family: Family, group: Sequence[RequestState], probe: AttentionProbe | None = None
) -> list[list[EncodedVisual]]:
    """Encode a group's distinct media in packed calls; returns each request's encoded media, in its order."""
    index: dict[Hashable, int] = {}
    media: list[VisualInput] = []
    seeds: list[int] = []
    keys = [mm_keys(state) for state in group]
    for state, own in zip(group, keys, strict=True):
        for key, mm_item, seed in zip(own, state.media, state.mm_seeds, strict=True):
            if key not in index:
                index[key] = len(media)
                media.append(mm_item)
                seeds.append(seed)
    encoded = family.encode(media, group[0].plan, trace=group[0].request.trace, seeds=seeds, probe=probe)
    return [[encoded[index[key]] for key in own] for own in keys]


def prefix(state: RequestState) -> list[tuple[Hashable, int]]:
    """An assembled prompt, span by span: a text's ids or the key of a visual span, and the number of its tokens."""
    keys = mm_keys(state)
    return [
        (span if isinstance(span, TextSpan) else (keys[span.mm_index], span.part), length)
        for span, length in state.prompt.content_spans
    ]


def common_prefix_len(one: RequestState, other: RequestState) -> int:
    """The number of leading tokens, as assembled, whose keys and values two requests share in every layer.

    It is 0 if no visual input is among them: a system prompt is not worth a wait. It is 0 if the plan acts in the
    decoder, unless both requests keep the same tokens there: since its steps look at visual tokens alone and the prefix
    holds all of them, or since the whole prompts are equal, and what is drawn is drawn alike.
    """
    if one.plan != other.plan:
        return 0
    common, pairs = 0, list(zip(one.prefix, other.prefix, strict=False))
    num_equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    common = sum(length for _, length in one.prefix[:num_equal])
    if not any(_is_visual(span) for span, _ in one.prefix[:num_equal]):
        return 0
    steps = [step for step in one.plan.steps if step.stage in _IN_DECODER]
    if steps:
        blind = all(step.reducer.evidence(step.stage) <= _OF_VISUAL_TOKENS for step in steps)
        same_prompt = one.prefix == other.prefix and one.decoder_seed == other.decoder_seed
        rest = one.prefix[num_equal:] + other.prefix[num_equal:]
        if not (blind or same_prompt) or one.request.trace or any(_is_visual(span) for span, _ in rest):
            return 0
    if num_equal < len(pairs):
        (span, _), (other_span, _) = pairs[num_equal]
        if isinstance(span, TextSpan) and isinstance(other_span, TextSpan):
            ids = zip(span.token_ids, other_span.token_ids, strict=False)
            common += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ids))
    return common


def snapshot_len(one: RequestState, other: RequestState) -> int:
    """The number of leading tokens behind which both could begin from one snapshot of recurrent states; 0 for none.

    A snapshot stands behind the last visual input that both have. The few words that their texts begin alike with are
    computed again; so it serves questions, too, that come later and begin otherwise.
    """
    common, place, length = common_prefix_len(one, other), 0, 0
    for span, num_tokens in one.prefix:
        length += num_tokens
        if _is_visual(span) and length <= common:
            place = length
    return place


def cached_prefix(other: RequestState, common: int) -> tuple[list[int], list[int]]:
    """The cached tokens of a prefilled request's first ``common`` tokens as assembled, by layer; and the visual ones.

    Tokens behind them were not reduced: see `common_prefix_len`.
    """
    behind, visual_behind = -common, 0
    for span, length in other.prefix:
        behind += length
        visual_behind += max(0, min(behind, length)) if _is_visual(span) else 0
    return [n - behind for n in other.lengths], [n - visual_behind for n in other.num_visual]


def _is_visual(span: Hashable) -> bool:
    return not isinstance(span, TextSpan)

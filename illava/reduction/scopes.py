"""Finds the visual tokens of packed prompts that are ranked together, and applies a reduction to the packed batch.

The host knows, span by span, how many visual tokens each frame and each visual input has left; the device keeps, for
every token, the span it came from. Both together find a scope's tokens without a host synchronisation, also with text
between them. After a reduction over a coarse scope only its total is known: finer counts are then read from the device.

Shape suffixes: T packed tokens, K kept tokens, N tokens in some scope, D channels, P rotary axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from illava.host_copies import constant_on
from illava.plan import ReductionPlan
from illava.reducers import Reducer, Scope
from illava.tokens import Assignment, gather_kept, merge, merged_sizes
from illava.visual_tokens import TokenSpan

ScopeKey = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """The tokens that a step may touch, scope by scope in packed order; on the host.

    Attributes:
        scope_of_span: scope index of every span of the batch, -1 for a span out of scope.
        lengths: tokens of each scope.
        requests: the request of each scope.
    """

    scope_of_span: tuple[int, ...]
    lengths: tuple[int, ...]
    requests: tuple[int, ...]

    def scope_T(self, span_T: Tensor) -> Tensor:
        """Scope index of every token: int64 [T], -1 out of scope."""
        return constant_on(self.scope_of_span, span_T.device)[span_T]

    def index_N(self, scope_T: Tensor) -> Tensor:
        """Indices of the selected tokens, ascending; by a stable sort, without a host synchronisation."""
        return torch.argsort((scope_T < 0).byte(), stable=True)[: sum(self.lengths)]


@dataclass(frozen=True, slots=True)
class VisualCounts:
    """Counts the visual tokens that are left, as far as the host knows.

    Attributes:
        spans: (request, span) of every span of the batch as it was assembled.
        groups: (spans, tokens): groups of visual spans whose common count is known; at first one span each.
        num_text: text tokens of each request; never reduced.
    """

    spans: tuple[tuple[int, TokenSpan], ...]
    groups: tuple[tuple[tuple[int, ...], int], ...]
    num_text: tuple[int, ...]

    @classmethod
    def of(cls, spans_of_request: Sequence[Sequence[TokenSpan]]) -> VisualCounts:
        """Count the tokens of freshly assembled prompts."""
        spans = tuple((request, span) for request, own in enumerate(spans_of_request) for span in own)
        groups = tuple(((n,), span.length) for n, (_, span) in enumerate(spans) if span.mm_index >= 0)
        text = tuple(sum(span.length for span in own if span.mm_index < 0) for own in spans_of_request)
        return cls(spans, groups, text)

    @property
    def num_visual(self) -> tuple[int, ...]:
        """Visual tokens of each request."""
        totals = [0] * len(self.num_text)
        for members, count in self.groups:
            totals[self.spans[members[0]][0]] += count
        return tuple(totals)

    @property
    def lengths(self) -> tuple[int, ...]:
        """All tokens of each request."""
        return tuple(text + mm_item for text, mm_item in zip(self.num_text, self.num_visual, strict=True))

    def knows(self, reducer: Reducer) -> bool:
        """Whether the count of every scope of this method is known on the host."""
        keys = _scope_keys(self.spans, reducer)
        return all(len({keys[n] for n in members}) == 1 for members, _ in self.groups)

    def measured(self, span_T: Tensor) -> VisualCounts:
        """The same with every span's count read from the device: one host synchronisation."""
        counts = torch.bincount(span_T, minlength=len(self.spans)).tolist()
        groups = tuple(((n,), counts[n]) for n, (_, span) in enumerate(self.spans) if span.mm_index >= 0)
        return replace(self, groups=groups)

    def select(self, reducer: Reducer) -> Selection:
        """All non-empty scopes of this method in packed order. Needs `knows(reducer)`."""
        keys, totals = _scope_keys(self.spans, reducer), dict[ScopeKey, int]()
        for members, count in self.groups:
            key = keys[members[0]]
            if key is not None and count:
                totals[key] = totals.get(key, 0) + count
        order = {key: n for n, key in enumerate(totals)}
        scope_of_span = tuple(-1 if key is None else order.get(key, -1) for key in keys)
        return Selection(scope_of_span, tuple(totals.values()), tuple(key[0] for key in totals))

    def reduced(self, selection: Selection, kept: Sequence[int]) -> VisualCounts:
        """The counts after each selected scope has kept ``kept[scope]`` tokens."""
        outside = [group for group in self.groups if selection.scope_of_span[group[0][0]] < 0]
        members: list[list[int]] = [[] for _ in kept]
        for n, scope in enumerate(selection.scope_of_span):
            if scope >= 0:
                members[scope].append(n)
        inside = [(tuple(own), count) for own, count in zip(members, kept, strict=True)]
        return replace(self, groups=tuple(sorted(outside + inside)))


@dataclass(frozen=True, slots=True)
class PackedPrompts:
    """Prompts of several requests, packed end to end, on their way through the layers.

    Attributes:
        hidden_TD: residual stream.
        position_PT: int64 rotary positions; kept tokens keep theirs.
        coord_T4: int64 (visual input, frame or tile, row, col), -1 for text.
        span_T: int64 index of the span each token came from.
        score_T: float32 attention received in the tower, for `decoder_input`; None elsewhere.
        counts: what the host knows.
        deepstack: features [T, D] still to be added, the first behind the layer that runs next; 0 for text.
        size_T: float32, how many visual tokens each one stands for, 1 for text; None where nothing asks for it.
    """

    hidden_TD: Tensor
    position_PT: Tensor
    coord_T4: Tensor
    span_T: Tensor
    score_T: Tensor | None
    counts: VisualCounts
    deepstack: tuple[Tensor, ...] = ()
    size_T: Tensor | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.counts.lengths

    def visual_index(self, request: int) -> Tensor:
        """Indices of one request's visual tokens; waits for the device."""
        own = [of == request and span.mm_index >= 0 for of, span in self.counts.spans]
        return constant_on(own, self.span_T.device)[self.span_T].nonzero().squeeze(1)

    def measured(self) -> PackedPrompts:
        """The same with every span's count known, read from the device."""
        return replace(self, counts=self.counts.measured(self.span_T))

    def reduced(self, assignment: Assignment, counts: VisualCounts) -> PackedPrompts:
        """Apply a mixing matrix over the whole packed batch."""
        return PackedPrompts(
            merge(assignment, self.hidden_TD),
            self.position_PT.index_select(1, assignment.kept_K),
            gather_kept(assignment, self.coord_T4),
            gather_kept(assignment, self.span_T),
            None,
            counts,
            tuple(merge(assignment, layer_TD) for layer_TD in self.deepstack),
            None if self.size_T is None else merged_sizes(assignment, self.size_T),
        )


def planned_lengths(spans: Sequence[TokenSpan], plan: ReductionPlan, num_layers: int) -> list[int]:
    """Tokens that one prompt will have in each decoder layer, by the plan alone; an upper bound if data decide."""
    counts = VisualCounts.of([spans])
    counts = _planned(counts, plan.at("decoder_input"))
    lengths = []
    for layer in range(num_layers):
        counts = _planned(counts, plan.at("decoder_layer", layer))
        lengths.append(counts.lengths[0])
    return lengths


def _planned(counts: VisualCounts, reducer: Reducer | None) -> VisualCounts:
    if reducer is None or not counts.knows(reducer):
        return counts
    selection = counts.select(reducer)
    return counts.reduced(selection, [reducer.most_kept(n) for n in selection.lengths])


def _scope_keys(spans: Sequence[tuple[int, TokenSpan]], reducer: Reducer) -> list[ScopeKey | None]:
    """The scope that each span belongs to; None for a span out of scope."""
    keys = [_scope_key(request, span, reducer.per) for request, span in spans]
    if reducer.frames_in_window is None:
        return keys
    frames_of: dict[tuple[int, int], list[int]] = {}  # the frames of each visual input, in order
    for request, span in spans:
        if span.mm_index >= 0 and span.frame >= 0 and span.length:
            frames_of.setdefault((request, span.mm_index), []).append(span.frame)
    rank = {
        (*mm_item, frame): n
        for mm_item, frames in frames_of.items()
        for n, frame in enumerate(sorted(set(frames)))
    }  # fmt: skip
    for n, (request, span) in enumerate(spans):
        if (request, span.mm_index) in frames_of:
            own = rank.get((request, span.mm_index, span.frame))
            keys[n] = None if own is None else (request, span.mm_index, own // reducer.frames_in_window)
    return keys


def _scope_key(request: int, span: TokenSpan, per: Scope) -> ScopeKey | None:
    """The scope that a span belongs to, its request first; None for a span out of scope."""
    if span.mm_index < 0 or (per == "frame" and span.frame < 0):
        return None
    return {
        "frame": (request, span.mm_index, span.frame),
        "span": (request, span.visual_span),
        "medium": (request, span.mm_index),
        "prompt": (request,),
    }[per]

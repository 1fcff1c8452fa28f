"""Assembles one request's prompt as the decoder reads it: text embeddings and visual tokens, each with its position.

The chat turn is rendered with as many placeholder tokens as the unreduced model needs. Visual tokens take some of the
placeholders; the other placeholders are left out, and leave gaps in the position ids.

Shape suffixes: S rendered tokens (text and placeholders), T tokens of a prompt or of packed prompts, K visual tokens of
one visual input, D model width, P rotary axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from illava.errors import ReductionDidNotFireError, RequestTooLargeError
from illava.families.base import Family
from illava.host_copies import on_device, to_device
from illava.reduction.scopes import PackedPrompts, VisualCounts
from illava.requests import Request, TokenTrace, TraceStep
from illava.visual_tokens import EncodedVisual, TokenSpan


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Consecutive text tokens."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """Consecutive visual tokens: part number ``part`` of the request's visual input number ``mm_index``."""

    mm_index: int
    part: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """An assembled prompt.

    Attributes:
        hidden_TD: text embeddings and visual tokens.
        position_PT: int64 rotary positions.
        coord_T4: int64 (visual input, frame or tile, row, col), -1 for text.
        score_T: float32 attention received in the tower, 0 for text; None where the plan needs none.
        token_spans: the kinds of the tokens, span by span.
        next_position_P: int64 position of the first generated token, as without reduction.
        media_order: the request's media in the order of the chat template, which may differ from the given order.
        deepstack: features [T, D] to add behind decoder layer 0, 1, ...; 0 for text.
        content_spans: the contents of the tokens and their numbers: a text's ids, or a part of a visual input.
        size_T: float32, how many visual tokens each one stands for, 1 for text; None where the plan needs none.
    """

    hidden_TD: Tensor
    position_PT: Tensor
    coord_T4: Tensor
    score_T: Tensor | None
    token_spans: tuple[TokenSpan, ...]
    next_position_P: Tensor
    media_order: tuple[int, ...] = ()
    deepstack: tuple[Tensor, ...] = ()
    content_spans: tuple[tuple[TextSpan | VisualSpan, int], ...] = ()
    size_T: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.hidden_TD.shape[0]

    def after(self, num_tokens: int) -> Prompt:
        """The same without its first tokens; ``content_spans`` stay."""
        token_spans, left = [], num_tokens
        for span in self.token_spans:
            taken = min(left, span.length)
            left -= taken
            if taken < span.length:
                token_spans.append(replace(span, length=span.length - taken))
        return replace(
            self,
            hidden_TD=self.hidden_TD[num_tokens:],
            position_PT=self.position_PT[:, num_tokens:],
            coord_T4=self.coord_T4[num_tokens:],
            score_T=None if self.score_T is None else self.score_T[num_tokens:],
            token_spans=tuple(token_spans),
            deepstack=tuple(layer_TD[num_tokens:] for layer_TD in self.deepstack),
            size_T=None if self.size_T is None else self.size_T[num_tokens:],
        )


def assemble(family: Family, request: Request, encoded: Sequence[EncodedVisual]) -> Prompt:
    """Render the conversation and put visual tokens in place of placeholders.

    Raises:
        RequestTooLargeError: prompt and answer are longer than the model's positions.
        ReductionDidNotFireError: a step of the tower removed nothing from any of the request's media.
    """
    _refuse_noop(request, encoded)
    rendered = family.render(
        request.content,
        [mm_item.num_placeholders for mm_item in encoded],
        history=request.history,
        template_args=request.template_args,
    )
    num_tokens, limit = len(rendered.token_ids), family.decoder.max_positions
    if num_tokens + request.sampling.max_new_tokens > limit:
        raise RequestTooLargeError(
            f"request {request.request_id!r}: {num_tokens} prompt tokens and {request.sampling.max_new_tokens} new "
            f"tokens exceed the model's {limit} positions; send fewer or smaller frames, images or pages at once, "
            "shorten the text, or lower max_new_tokens"
        )
    device = family.decoder.device
    position_PS = to_device(family.position_ids(rendered, request.media), device)
    id_S = on_device(rendered.token_ids, device)
    builder = _PromptBuilder(family, id_S, rendered.token_ids, encoded)
    order = sorted(range(len(encoded)), key=rendered.spans.__getitem__)
    for index in order:
        mm_item, (start, length) = encoded[index], rendered.spans[index]
        if length != mm_item.num_placeholders:
            raise RuntimeError(
                f"visual input {index} has {mm_item.num_placeholders} placeholder tokens, the prompt gives it {length}"
            )
        for part, (span, begin, stop) in enumerate(_visual_spans(mm_item, start, rendered.starts.get(index, ()))):
            builder.add_text(begin)
            builder.add_visual(VisualSpan(index, part), span, begin, stop - begin)
    builder.add_text(num_tokens)
    index_T = torch.cat(builder.rendered_indices)
    scored = all(mm_item.score_K is not None for mm_item in encoded)
    return Prompt(
        torch.cat(builder.hidden),
        position_PS[:, index_T],
        torch.cat(builder.coords),
        torch.cat(builder.scores) if scored else None,
        tuple(builder.token_spans),
        position_PS[:, -1] + 1,
        tuple(order),
        tuple(torch.cat(layer) for layer in zip(*builder.deepstack, strict=True)),
        tuple(builder.content_spans),
        torch.cat(builder.sizes) if builder.has_sizes else None,
    )


def _refuse_noop(request: Request, encoded: Sequence[EncodedVisual]) -> None:
    """Raise if a step was a no-op for all media of this request, whatever it did for others of its batch."""
    noop = (
        [step for step in encoded[0].noop_steps if all(step in mm_item.noop_steps for mm_item in encoded)]
        if encoded
        else []
    )
    if noop:
        raise ReductionDidNotFireError(
            f"request {request.request_id!r}: {', '.join(noop)} removed nothing from any of its {len(encoded)} media; "
            "lower the budget, leave the step out, or send media that it can reduce (merging frames needs a video)"
        )


def _visual_spans(
    mm_item: EncodedVisual, start: int, starts: Sequence[int]
) -> Iterator[tuple[EncodedVisual, int, int]]:
    """The visual spans of one input, each with its placeholders (first, end): one span, or one a frame."""
    if not starts:
        yield mm_item, start, start + mm_item.num_placeholders
        return
    length, first = mm_item.num_placeholders // len(starts), 0
    for n, (begin, frame_count) in enumerate(zip(starts, mm_item.frame_counts, strict=True)):
        own = slice(first, first + frame_count[1])
        first = own.stop
        span = replace(
            mm_item,
            feature_KD=mm_item.feature_KD[own],
            placeholder_K=mm_item.placeholder_K[own] - n * length,
            frame_counts=(frame_count,),
            coord_K3=mm_item.coord_K3[own],
            score_K=None if mm_item.score_K is None else mm_item.score_K[own],
            deepstack=tuple(layer_KD[own] for layer_KD in mm_item.deepstack),
            size_K=None if mm_item.size_K is None else mm_item.size_K[own],
        )
        yield span, begin, begin + length


class _PromptBuilder:
    """Lays the spans of one prompt end to end."""

    def __init__(
        self, family: Family, id_S: Tensor, token_ids: Sequence[int], encoded: Sequence[EncodedVisual]
    ) -> None:
        self.family, self.id_S, self.cursor, self.visual_span = family, id_S, 0, 0
        self.token_ids = token_ids
        self.content_spans: list[tuple[TextSpan | VisualSpan, int]] = []
        self.hidden: list[Tensor] = []
        self.rendered_indices: list[Tensor] = []
        self.coords: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.has_sizes = any(mm_item.size_K is not None for mm_item in encoded)
        self.sizes: list[Tensor] = []
        self.token_spans: list[TokenSpan] = []
        self.num_deepstack = max((len(mm_item.deepstack) for mm_item in encoded), default=0)
        self.deepstack: list[tuple[Tensor, ...]] = []

    def add_text(self, stop: int) -> None:
        """Add the text from the cursor up to rendered token ``stop``."""
        if stop == self.cursor:
            return
        length, device = stop - self.cursor, self.id_S.device
        self.hidden.append(self.family.embed(self.id_S[self.cursor : stop]))
        self.deepstack.append((torch.zeros_like(self.hidden[-1]),) * self.num_deepstack)
        self.rendered_indices.append(torch.arange(self.cursor, stop, device=device))
        self.coords.append(torch.full((length, 4), -1, device=device))
        self.scores.append(torch.zeros(length, device=device))
        if self.has_sizes:
            self.sizes.append(torch.ones(length, device=device))
        self.token_spans.append(TokenSpan(length))
        self.content_spans.append((TextSpan(tuple(self.token_ids[self.cursor : stop])), length))
        self.cursor, self.visual_span = stop, self.visual_span + 1

    def add_visual(self, own: VisualSpan, mm_item: EncodedVisual, start: int, length: int) -> None:
        """Add visual tokens in place of the ``length`` placeholders from ``start`` on."""
        self.hidden.append(mm_item.feature_KD.to(self.family.decoder.dtype))
        self.deepstack.append(tuple(layer_KD.to(self.family.decoder.dtype) for layer_KD in mm_item.deepstack))
        self.rendered_indices.append(mm_item.placeholder_K + start)
        self.coords.append(torch.cat([torch.full_like(mm_item.coord_K3[:, :1], own.mm_index), mm_item.coord_K3], 1))
        if mm_item.score_K is not None:
            self.scores.append(mm_item.score_K)
        if mm_item.size_K is not None:
            self.sizes.append(mm_item.size_K)
        self.token_spans += [
            TokenSpan(count, own.mm_index, self.visual_span, frame) for frame, count in mm_item.frame_counts if count
        ]
        self.content_spans.append((own, mm_item.feature_KD.shape[0]))
        self.cursor = start + length


def pack(prompts: Sequence[Prompt]) -> PackedPrompts:
    """Lay prompts end to end."""
    counts = VisualCounts.of([prompt.token_spans for prompt in prompts])
    hidden_TD = torch.cat([prompt.hidden_TD for prompt in prompts])
    span_lengths = torch.tensor([span.length for _, span in counts.spans])
    span_T = to_device(torch.arange(len(counts.spans)).repeat_interleave(span_lengths), hidden_TD.device)
    scores = [prompt.score_T for prompt in prompts if prompt.score_T is not None]
    return PackedPrompts(
        hidden_TD,
        torch.cat([prompt.position_PT for prompt in prompts], 1),
        torch.cat([prompt.coord_T4 for prompt in prompts]),
        span_T,
        torch.cat(scores) if len(scores) == len(prompts) else None,
        counts,
        tuple(torch.cat(layer) for layer in zip(*_deepstacks(prompts), strict=True)),
        _packed_sizes(prompts),
    )


def _packed_sizes(prompts: Sequence[Prompt]) -> Tensor | None:
    """Every prompt's sizes; ones for a prompt without vision beside prompts with vision; None where none has any."""
    if all(prompt.size_T is None for prompt in prompts):
        return None
    ones = (prompt.hidden_TD.new_ones(prompt.num_tokens, dtype=torch.float32) for prompt in prompts)
    return torch.cat(
        [one if prompt.size_T is None else prompt.size_T for one, prompt in zip(ones, prompts, strict=True)]
    )


def _deepstacks(prompts: Sequence[Prompt]) -> list[tuple[Tensor, ...]]:
    """Every prompt's deepstack features; zeros for a prompt without vision beside prompts with vision."""
    num_layers = max(len(prompt.deepstack) for prompt in prompts)
    return [prompt.deepstack or (torch.zeros_like(prompt.hidden_TD),) * num_layers for prompt in prompts]


def join_trace(encoded: Sequence[EncodedVisual], prompt: Prompt, decoder_steps: Sequence[TraceStep]) -> TokenTrace:
    """Join the traces of a request's media, in prompt order, and of the decoder.

    A visual input without a step that another one has (an image beside a video) passes through that step unchanged.
    """
    traces = [(index, encoded[index].trace, encoded[index].patch_coord_P4) for index in prompt.media_order]
    patches = [_in_mm_item(index, coord_P4) for index, _, coord_P4 in traces]
    sites = dict.fromkeys((step.stage, step.layer) for _, trace, _ in traces for step in trace)
    coords, steps = list(patches), []
    for site in sites:
        blocks = []
        for n, (index, trace, _) in enumerate(traces):
            step = next((step for step in trace if (step.stage, step.layer) == site), None)
            if step is not None:
                coords[n] = _in_mm_item(index, step.coords)
            blocks.append(_identity(coords[n].shape[0]) if step is None else step.matrix)
        steps.append(TraceStep(site[0], site[1], _block_diagonal(blocks), torch.cat(coords)))
    empty = torch.empty(0, 4, dtype=torch.long)
    return TokenTrace(torch.cat([empty, *patches]), (*steps, *decoder_steps))


def _in_mm_item(index: int, coord_X4: Tensor | None) -> Tensor:
    if coord_X4 is None:
        raise RuntimeError(f"visual input {index} was traced, but its family gave no patch coordinates")
    coord_X4 = coord_X4.clone()
    coord_X4[:, 0] = index
    return coord_X4


def _identity(size: int) -> Tensor:
    index, value = torch.arange(size).expand(2, size), torch.ones(size)
    return torch.sparse_coo_tensor(index, value, (size, size), check_invariants=False).coalesce()


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Put sparse blocks along the diagonal of one sparse matrix."""
    index, value, row, col = [], [], 0, 0
    for block in (block.coalesce() for block in blocks):
        index.append(block.indices() + torch.tensor([[row], [col]]))
        value.append(block.values())
        row, col = row + block.shape[0], col + block.shape[1]
    return torch.sparse_coo_tensor(torch.cat(index, 1), torch.cat(value), (row, col), check_invariants=False).coalesce()

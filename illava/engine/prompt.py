"""One request's prompt as the decoder reads it: text embeddings and visual tokens in order, each with its position.

A medium's placeholders are slots; only slots that a visual token takes exist, the others leave gaps in the position
ids. Knows the family's interface and nothing of layers, caches or scheduling.

Shape suffixes: T tokens of a prompt or of packed prompts, K visual tokens of a medium, D model width, P rotary axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from illava.errors import ReductionDidNotFireError, RequestError
from illava.families.base import Family
from illava.preprocess import VisualInput
from illava.reduction.scopes import PackedPrompts, VisualCounts
from illava.requests import Request, TokenTrace, TraceStep
from illava.visual_tokens import EncodedVisual, Run


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Consecutive text tokens."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """Consecutive visual tokens: part number ``part`` of the request's medium number ``visual``."""

    visual: int
    part: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """An assembled prompt.

    Attributes:
        hidden_TD: text embeddings and visual tokens.
        position_PT: int64 rotary positions.
        coord_T4: int64 (medium, frame or tile, row, col), -1 for text.
        score_T: float32 attention received in the tower, 0 for text; None where the plan needs none.
        runs: what the tokens are, run by run.
        next_position_P: int64 position of the first generated token, as without reduction.
        media_order: the request's media as the chat template placed them, which may differ from how they were given.
        deepstack: features [T, D] to add behind decoder layer 0, 1, ...; 0 for text.
        pieces: what the tokens are in the host's words, with their number: ids of text, or (medium, part of it).
    """

    hidden_TD: Tensor
    position_PT: Tensor
    coord_T4: Tensor
    score_T: Tensor | None
    runs: tuple[Run, ...]
    next_position_P: Tensor
    media_order: tuple[int, ...] = ()
    deepstack: tuple[Tensor, ...] = ()
    pieces: tuple[tuple[TextSpan | VisualSpan, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.hidden_TD.shape[0]

    def after(self, num_tokens: int) -> Prompt:
        """The same without its first tokens; ``pieces`` stay."""
        runs, left = [], num_tokens
        for run in self.runs:
            taken = min(left, run.length)
            left -= taken
            if taken < run.length:
                runs.append(replace(run, length=run.length - taken))
        return replace(
            self,
            hidden_TD=self.hidden_TD[num_tokens:],
            position_PT=self.position_PT[:, num_tokens:],
            coord_T4=self.coord_T4[num_tokens:],
            score_T=None if self.score_T is None else self.score_T[num_tokens:],
            runs=tuple(runs),
            deepstack=tuple(layer_TD[num_tokens:] for layer_TD in self.deepstack),
        )


def media_of(request: Request) -> tuple[VisualInput, ...]:
    """The request's images and videos in the order they are read."""
    return tuple(part for part in request.content if not isinstance(part, str))


def assemble(family: Family, request: Request, encoded: Sequence[EncodedVisual]) -> Prompt:
    """Render the chat turn and put visual tokens into their slots.

    Raises:
        RequestError: prompt and answer are longer than the model's positions.
        ReductionDidNotFireError: a step of the tower took nothing from any of the request's media.
    """
    _refuse_noop(request, encoded)
    rendered = family.render(request.content, [visual.num_placeholders for visual in encoded])
    num_placeholders, limit = len(rendered.token_ids), family.decoder.max_positions
    if num_placeholders + request.sampling.max_new_tokens > limit:
        raise RequestError(
            f"request {request.request_id!r}: {num_placeholders} prompt tokens and {request.sampling.max_new_tokens} "
            f"new tokens exceed the model's {limit} positions; send fewer frames or images, or lower max_new_tokens"
        )
    device = family.decoder.device
    position_PS = family.position_ids(rendered, media_of(request)).to(device)
    id_S = torch.tensor(rendered.token_ids, device=device)
    parts = _Parts(family, id_S, rendered.token_ids, encoded)
    order = sorted(range(len(encoded)), key=rendered.spans.__getitem__)
    for index in order:
        visual, (start, length) = encoded[index], rendered.spans[index]
        if length != visual.num_placeholders:
            raise RuntimeError(f"medium {index} has {visual.num_placeholders} slots, the prompt gives it {length}")
        for part, (piece, begin, stop) in enumerate(_pieces(visual, start, rendered.starts.get(index, ()))):
            parts.add_text(begin)
            parts.add_visual(VisualSpan(index, part), piece, begin, stop - begin)
    parts.add_text(num_placeholders)
    slot_T = torch.cat(parts.slots)
    scored = all(visual.score_K is not None for visual in encoded)
    return Prompt(
        torch.cat(parts.hidden),
        position_PS[:, slot_T],
        torch.cat(parts.places),
        torch.cat(parts.scores) if scored else None,
        tuple(parts.runs),
        position_PS[:, -1] + 1,
        tuple(order),
        tuple(torch.cat(layer) for layer in zip(*parts.deepstack, strict=True)),
        tuple(parts.pieces),
    )


def _refuse_noop(request: Request, encoded: Sequence[EncodedVisual]) -> None:
    """Whatever was packed beside it: a step that did nothing for this request is this request's error."""
    idle = (
        [step for step in encoded[0].noop_steps if all(step in visual.noop_steps for visual in encoded)]
        if encoded
        else []
    )
    if idle:
        raise ReductionDidNotFireError(
            f"request {request.request_id!r}: {', '.join(idle)} removed nothing from any of its {len(encoded)} media; "
            "lower the budget, leave the step out, or send media that it can reduce (joining frames needs a video)"
        )


def _pieces(visual: EncodedVisual, start: int, starts: Sequence[int]) -> Iterator[tuple[EncodedVisual, int, int]]:
    """A medium's tokens with the slots (first, end) they may take: at once, or frame by frame with text between."""
    if not starts:
        yield visual, start, start + visual.num_placeholders
        return
    length, first = visual.num_placeholders // len(starts), 0
    for n, (begin, frame_count) in enumerate(zip(starts, visual.frame_counts, strict=True)):
        own = slice(first, first + frame_count[1])
        first = own.stop
        piece = replace(
            visual,
            feature_KD=visual.feature_KD[own],
            placeholder_K=visual.placeholder_K[own] - n * length,
            frame_counts=(frame_count,),
            coord_K3=visual.coord_K3[own],
            score_K=None if visual.score_K is None else visual.score_K[own],
            deepstack=tuple(layer_KD[own] for layer_KD in visual.deepstack),
        )
        yield piece, begin, begin + length


class _Parts:
    """The pieces of one prompt as they are laid end to end."""

    def __init__(
        self, family: Family, id_S: Tensor, token_ids: Sequence[int], encoded: Sequence[EncodedVisual]
    ) -> None:
        self.family, self.id_S, self.cursor, self.span = family, id_S, 0, 0
        self.token_ids = token_ids
        self.pieces: list[tuple[TextSpan | VisualSpan, int]] = []
        self.hidden: list[Tensor] = []
        self.slots: list[Tensor] = []
        self.places: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.runs: list[Run] = []
        self.num_deepstack = max((len(visual.deepstack) for visual in encoded), default=0)
        self.deepstack: list[tuple[Tensor, ...]] = []

    def add_text(self, stop: int) -> None:
        """Text from the cursor up to slot ``stop``."""
        if stop == self.cursor:
            return
        length, device = stop - self.cursor, self.id_S.device
        self.hidden.append(self.family.embed(self.id_S[self.cursor : stop]))
        self.deepstack.append((torch.zeros_like(self.hidden[-1]),) * self.num_deepstack)
        self.slots.append(torch.arange(self.cursor, stop, device=device))
        self.places.append(torch.full((length, 4), -1, device=device))
        self.scores.append(torch.zeros(length, device=device))
        self.runs.append(Run(length))
        self.pieces.append((TextSpan(tuple(self.token_ids[self.cursor : stop])), length))
        self.cursor, self.span = stop, self.span + 1

    def add_visual(self, own: VisualSpan, visual: EncodedVisual, start: int, length: int) -> None:
        """A medium's visual tokens, in the ``length`` slots from ``start`` on."""
        self.hidden.append(visual.feature_KD.to(self.family.decoder.dtype))
        self.deepstack.append(tuple(layer_KD.to(self.family.decoder.dtype) for layer_KD in visual.deepstack))
        self.slots.append(visual.placeholder_K + start)
        self.places.append(torch.cat([torch.full_like(visual.coord_K3[:, :1], own.visual), visual.coord_K3], 1))
        if visual.score_K is not None:
            self.scores.append(visual.score_K)
        self.runs += [Run(count, own.visual, self.span, frame) for frame, count in visual.frame_counts if count]
        self.pieces.append((own, visual.feature_KD.shape[0]))
        self.cursor = start + length


def pack(prompts: Sequence[Prompt]) -> PackedPrompts:
    """Lay prompts end to end."""
    counts = VisualCounts.of([prompt.runs for prompt in prompts])
    hidden_TD = torch.cat([prompt.hidden_TD for prompt in prompts])
    run_lengths = torch.tensor([run.length for _, run in counts.runs])
    run_T = torch.arange(len(counts.runs)).repeat_interleave(run_lengths).to(hidden_TD.device)
    scores = [prompt.score_T for prompt in prompts if prompt.score_T is not None]
    return PackedPrompts(
        hidden_TD,
        torch.cat([prompt.position_PT for prompt in prompts], 1),
        torch.cat([prompt.coord_T4 for prompt in prompts]),
        run_T,
        torch.cat(scores) if len(scores) == len(prompts) else None,
        counts,
        tuple(torch.cat(layer) for layer in zip(*_deepstacks(prompts), strict=True)),
    )


def _deepstacks(prompts: Sequence[Prompt]) -> list[tuple[Tensor, ...]]:
    """Every prompt's deepstack features; zeros for one that has no vision where others have."""
    num_layers = max(len(prompt.deepstack) for prompt in prompts)
    return [prompt.deepstack or (torch.zeros_like(prompt.hidden_TD),) * num_layers for prompt in prompts]


def join_trace(encoded: Sequence[EncodedVisual], prompt: Prompt, decoder_steps: Sequence[TraceStep]) -> TokenTrace:
    """The trace of a whole request from those of its media, in prompt order, and of the decoder.

    Media that lack a step another one has (an image beside a video) pass through it unchanged.
    """
    traces = [(index, encoded[index].trace, encoded[index].patch_coord_P4) for index in prompt.media_order]
    patches = [_in_medium(index, coord_P4) for index, _, coord_P4 in traces]
    sites = dict.fromkeys((step.stage, step.layer) for _, trace, _ in traces for step in trace)
    places, steps = list(patches), []
    for site in sites:
        blocks = []
        for n, (index, trace, _) in enumerate(traces):
            step = next((step for step in trace if (step.stage, step.layer) == site), None)
            if step is not None:
                places[n] = _in_medium(index, step.place)
            blocks.append(_identity(places[n].shape[0]) if step is None else step.matrix)
        steps.append(TraceStep(site[0], site[1], _block_diagonal(blocks), torch.cat(places)))
    empty = torch.empty(0, 4, dtype=torch.long)
    return TokenTrace(torch.cat([empty, *patches]), (*steps, *decoder_steps))


def _in_medium(index: int, coord_X4: Tensor | None) -> Tensor:
    if coord_X4 is None:
        raise RuntimeError(f"medium {index} was traced, but its family gave no patch places")
    coord_X4 = coord_X4.clone()
    coord_X4[:, 0] = index
    return coord_X4


def _identity(size: int) -> Tensor:
    index, value = torch.arange(size).expand(2, size), torch.ones(size)
    return torch.sparse_coo_tensor(index, value, (size, size), check_invariants=False).coalesce()


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Sparse blocks along the diagonal of one sparse matrix."""
    index, value, row, col = [], [], 0, 0
    for block in (block.coalesce() for block in blocks):
        index.append(block.indices() + torch.tensor([[row], [col]]))
        value.append(block.values())
        row, col = row + block.shape[0], col + block.shape[1]
    return torch.sparse_coo_tensor(torch.cat(index, 1), torch.cat(value), (row, col), check_invariants=False).coalesce()

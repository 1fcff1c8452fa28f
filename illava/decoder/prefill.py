"""Prefills packed prompts, whole or in chunks: prompts through all layers, keys and values into the cache.

Layers between two reductions form a group. Within a group a chunk of tokens may run ahead, since a token sees only the
tokens before it. The next group starts when the whole scope has been scored. So a long video can be prefilled a chunk
a step while other requests decode, with the same result.

Shape suffixes: T packed tokens, C tokens of a chunk, U keys of a chunk, B requests, D model width, H query heads, G
key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from illava.attention.packed import chunk_attention, packed_attention
from illava.decoder.decoder import Decoder, Projected, recurrent_of
from illava.decoder.kv_cache import BatchBlockTables, PagedCache
from illava.decoder.layer_ops import rms_norm
from illava.errors import ReductionDidNotFireError
from illava.host_copies import on_device
from illava.plan import ReductionPlan
from illava.reduction.decoder import DecoderReduction, size_bias
from illava.reduction.probe import AttentionProbe
from illava.reduction.scopes import PackedPrompts
from illava.requests import TraceStep

_Span = tuple[int, int, int]  # request, its first and its end token


@dataclass(frozen=True, slots=True)
class Prefill:
    """The result of a packed prefill. All counts are of the tensors that ran.

    Attributes:
        logits_BV: after each request's last token.
        lengths_LB: tokens of each request that were computed, by layer.
        num_visual_LB: visual tokens among them.
        errors: the error of each request that failed alone; the results of the others are valid.
        traces: decoder steps of the requests that asked for them.
    """

    logits_BV: Tensor
    lengths_LB: list[tuple[int, ...]]
    num_visual_LB: list[tuple[int, ...]]
    errors: dict[int, ReductionDidNotFireError]
    traces: dict[int, list[TraceStep]]


@torch.inference_mode()
def prefill(
    decoder: Decoder,
    prompts: PackedPrompts,
    plan: ReductionPlan,
    cache: PagedCache,
    blocks: BatchBlockTables,
    *,
    seeds: Sequence[int],
    traced: Sequence[int] = (),
) -> Prefill:
    """Run packed prompts of one plan through all layers at once. Args: see `PrefillRun`."""
    done = PrefillRun(decoder, prompts, plan, cache, blocks, seeds=seeds, traced=traced).advance()
    if done is None:
        raise RuntimeError("a prefill without a budget stopped early")
    return done


class PrefillRun:
    """Prefills one packed group of prompts; call `advance` until it gives the result.

    Other requests may decode between two calls: the cache's blocks of this group are its own.

    Args:
        decoder: its layers run.
        prompts: B requests; the logits wanted are those of each one's last token.
        plan: its `decoder_input` and `decoder_layer` steps act here.
        cache: receives every layer's keys and values, reduced ones from the reduced layer on.
        blocks: the requests' block tables; their counts are not read.
        seeds: an integer per request, the root of what reducers draw.
        traced: requests, by row of the batch, whose mixing matrices are copied to the host.
        num_computed: by request and layer, the tokens before these prompts whose keys and values its blocks hold
            already. Then no visual token may follow that a decoder step would have ranked with those tokens.
        probe: is given the attention of every layer but the last; every layer is then a group of its own.

    Raises:
        ValueError: a probe together with cached tokens; a probe needs whole prompts.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        prompts: PackedPrompts,
        plan: ReductionPlan,
        cache: PagedCache,
        blocks: BatchBlockTables,
        *,
        seeds: Sequence[int],
        traced: Sequence[int] = (),
        num_computed: Sequence[Sequence[int]] = (),
        probe: AttentionProbe | None = None,
    ) -> None:
        self._decoder, self._cache, self._block_tables = decoder, cache, blocks
        self._plan = plan
        self._reduction = DecoderReduction(plan, seeds=seeds, traced=traced, scale=decoder.scale, probe=probe)
        starts = plan.layers("decoder_layer") if probe is None else range(1, decoder.num_layers)
        self._bounds = [0, *starts, decoder.num_layers]
        self._num_computed_LB = (
            list(zip(*num_computed, strict=True)) or [(0,) * len(prompts.lengths)] * decoder.num_layers
        )
        if probe is not None and any(map(any, self._num_computed_LB)):
            raise ValueError("a probe needs whole prompts: none of their tokens can be cached already")
        self._lengths_LB: list[tuple[int, ...]] = []
        self._num_visual_LB: list[tuple[int, ...]] = []
        if blocks.states is not None:
            recurrent_of(cache, blocks)[0].begin(blocks.states, self._num_computed_LB[-1])
        self._group = 0
        self._open(self._reduction.apply(prompts, "decoder_input"))

    @torch.inference_mode()
    def advance(self, max_tokens: int | None = None) -> Prefill | None:
        """Compute as much as ``max_tokens`` tokens cost in all layers, at least one token; None computes everything.

        A group of fewer layers takes a longer chunk in proportion. Returns None while tokens are left.
        """
        layers_left = None if max_tokens is None else max_tokens * self._decoder.num_layers
        while True:
            depth = self._bounds[self._group + 1] - self._bounds[self._group]
            taken = self._chunk(None if layers_left is None else max(1, layers_left // depth))
            if layers_left is not None:
                layers_left -= taken * depth
            if not self._remaining:
                if self._group == len(self._bounds) - 2:
                    return self._result()
                self._next_group()
            if layers_left is not None and layers_left < self._bounds[self._group + 1] - self._bounds[self._group]:
                return None

    def _open(self, prompts: PackedPrompts) -> None:
        """Prepare the group that starts here for its first chunk."""
        first, stop = self._bounds[self._group : self._group + 2]
        lengths, num_tokens = prompts.lengths, prompts.hidden_TD.shape[0]
        if sum(lengths) != num_tokens:
            raise RuntimeError(f"layer {first} has {num_tokens} tokens; counted were {sum(lengths)}")
        self._prompts, self._starts = prompts, [0, *accumulate(lengths)]
        self._bias_T = size_bias(self._plan, prompts)
        self._rotary = self._decoder.rotary_at(prompts.hidden_TD, prompts.position_PT)
        self._remaining = [(row, 0, stop) for row, stop in enumerate(lengths) if stop]
        self._done: list[tuple[Tensor, ...]] = []  # of each chunk: hidden; behind attention queries and keys, too
        if self._block_tables.states is not None:
            self._places = self._block_tables.states.places(lengths, self._num_computed_LB[first])
        self._lengths_LB += [lengths] * (stop - first)
        self._num_visual_LB += [prompts.counts.num_visual] * (stop - first)

    def _next_group(self) -> None:
        """Reduce before the first layer of the next group, now that all tokens have reached it."""
        hidden_TD, *attended = (_join(parts) for parts in zip(*self._done, strict=True))
        first, stop = self._bounds[self._group : self._group + 2]
        deepstack = self._prompts.deepstack[stop - first :]
        entering = replace(self._prompts, hidden_TD=hidden_TD, deepstack=deepstack)
        decoder, rotary = self._decoder, self._rotary
        reduced = self._reduction.apply(
            entering,
            "decoder_layer",
            stop,
            qk=(attended[0], attended[1]) if attended else None,
            own_qk=lambda: decoder.project(decoder.layers[stop], hidden_TD, rotary)[:2],
        )
        self._group += 1
        self._open(reduced)

    def _chunk(self, max_tokens: int | None) -> int:
        """Run the next tokens through the group's layers; returns their number."""
        spans = self._take(max_tokens)
        own = [slice(self._starts[row] + begin, self._starts[row] + end) for row, begin, end in spans]
        whole = sum(end - begin for _, begin, end in spans) == self._prompts.hidden_TD.shape[0]
        hidden_CD, deepstack = (
            (self._prompts.hidden_TD, self._prompts.deepstack)
            if whole
            else (_rows(self._prompts.hidden_TD, own), [_rows(layer_TD, own) for layer_TD in self._prompts.deepstack])
        )
        cos_T1d, sin_T1d = self._rotary
        rotary = self._rotary if whole else (_rows(cos_T1d, own), _rows(sin_T1d, own))
        bias_C = self._bias_T if whole or self._bias_T is None else _rows(self._bias_T, own)
        first, stop = self._bounds[self._group : self._group + 2]
        own_qkv: Projected | None = None
        for n in range(first, stop):
            layer = self._decoder.layers[n]
            if n in self._decoder.recurrent:
                own_qkv = None
                hidden_CD = self._recur(n, spans, hidden_CD)
            else:
                slot_C = self._cache.span_slots(self._table_BM(n), self._in_cache(n, spans))
                own_qkv = self._decoder.project(layer, hidden_CD, rotary, into=(self._cache, slot_C))
                if bias_C is not None:
                    self._cache.write_bias(slot_C, bias_C)
                if n == self._decoder.num_layers - 1:
                    self._keep_last(spans, hidden_CD, own_qkv)
                    break  # only the last tokens' outputs are read there: `_result`
                mixed_CHd = self._attend(n, spans, own_qkv, bias_C)
                hidden_CD = self._decoder.finish(layer, hidden_CD, mixed_CHd, own_qkv.gate_THd)
            if n - first < len(deepstack):
                hidden_CD = hidden_CD + deepstack[n - first]
        else:
            self._done.append((hidden_CD, *(() if own_qkv is None else own_qkv[:2])))
        return hidden_CD.shape[0]

    def _recur(self, n: int, spans: Sequence[_Span], hidden_CD: Tensor) -> Tensor:
        """Run a recurrent layer over a chunk; its states go on where the chunk before left them."""
        states, rows = recurrent_of(self._cache, self._block_tables)
        layer = self._decoder.layers[n]
        normed_CD = rms_norm(layer.input_layernorm, hidden_CD)
        mixed_CD = self._decoder.recurrent[n].run(normed_CD, spans, states, rows, self._places)
        return self._decoder.feed_forward(layer, hidden_CD, mixed_CD)

    def _keep_last(self, spans: Sequence[_Span], hidden_CD: Tensor, own_qkv: Projected) -> None:
        """Keep the last layer's input, query and gate at each request's last token."""
        ends = zip(spans, accumulate(end - begin for _, begin, end in spans), strict=True)
        last = [at - 1 for (row, _, end), at in ends if end == self._prompts.lengths[row]]
        index_B = on_device(last, hidden_CD.device, torch.long)
        gate = () if own_qkv.gate_THd is None else (own_qkv.gate_THd[index_B],)
        self._done.append((hidden_CD[index_B], own_qkv.q_THd[index_B], *gate))

    def _table_BM(self, n: int) -> Tensor:
        """The blocks of a layer that keeps keys and values."""
        return self._block_tables.table_LBM[self._decoder.kv_index[n]]

    def _take(self, max_tokens: int | None) -> tuple[_Span, ...]:
        """The next spans, in packed order, of no more tokens than given."""
        capacity, spans = max_tokens, []
        while self._remaining and (capacity is None or capacity > 0):
            row, begin, stop = self._remaining.pop(0)
            end = stop if capacity is None else min(stop, begin + capacity)
            spans.append((row, begin, end))
            if end < stop:
                self._remaining.insert(0, (row, end, stop))
            capacity = None if capacity is None else capacity - (end - begin)
        return tuple(spans)

    def _attend(self, n: int, spans: tuple[_Span, ...], own_qkv: Projected, bias_C: Tensor | None) -> Tensor:
        """Attend with a chunk's queries over their requests' keys so far; earlier chunks' keys lie in the cache."""
        lengths, scale = [end - begin for _, begin, end in spans], self._decoder.scale
        in_cache, qkv = self._in_cache(n, spans), own_qkv[:3]
        if all(begin == 0 for _, begin, _ in in_cache):
            return packed_attention(*qkv, lengths, causal=True, scale=scale, key_bias_T=bias_C)
        so_far = tuple((row, 0, end) for row, _, end in in_cache)
        slot_U = self._cache.span_slots(self._table_BM(n), so_far)
        k_UGd, v_UGd = self._cache.read(slot_U)
        key_lengths = [end for _, _, end in in_cache]
        bias_U = None if bias_C is None else self._cache.read_bias(slot_U)
        return chunk_attention(qkv[0], k_UGd, v_UGd, lengths, key_lengths, scale=scale, key_bias_U=bias_U)

    def _in_cache(self, n: int, spans: Sequence[_Span]) -> tuple[_Span, ...]:
        """Spans of these prompts as the cache's layer n counts them: behind the tokens cached before."""
        num_computed_B = self._num_computed_LB[n]
        return tuple((row, num_computed_B[row] + begin, num_computed_B[row] + end) for row, begin, end in spans)

    def _result(self) -> Prefill:
        """Finish: the last layer's outputs are needed at last tokens only, so it runs as in a decode step."""
        decoder = self._decoder
        lengths = [n + own for n, own in zip(self._num_computed_LB[-1], self._prompts.lengths, strict=True)]
        hidden_BD, q_BHd, *gate = (_join(parts) for parts in zip(*self._done, strict=True))
        length_B = on_device(lengths, decoder.device, torch.int32)
        blocks = replace(self._block_tables.layer(-1), length_B=length_B, host_lengths=lengths)
        if self._bias_T is not None:
            blocks = replace(blocks, num_biased_B=length_B, host_num_biased=lengths)
        mixed_BHd = decoder.attend_paged(q_BHd, self._cache, blocks)
        logits_BV = decoder.head(decoder.finish(decoder.layers[-1], hidden_BD, mixed_BHd, *gate))
        found = self._reduction
        return Prefill(logits_BV, self._lengths_LB, self._num_visual_LB, found.errors, found.traces)


def _rows(value_TX: Tensor, own: Sequence[slice]) -> Tensor:
    return _join([value_TX[rows] for rows in own])


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))

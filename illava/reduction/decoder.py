"""Reduces tokens in the decoder: before its first layer, and between two layers.

A reduction finds the tokens in scope, computes the evidence that the reducer asks for and nothing else, and embeds the
assignment in the packed batch. It notes the requests that lost nothing, and records trace steps. Knows no layer's
modules and no reducer by name.

Shape suffixes: T packed tokens, N tokens in scope, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from illava.attention.scores import causal_attention_received, last_query_attention
from illava.errors import PlanError, ReductionDidNotFireError
from illava.plan import ReductionPlan
from illava.reducers import Evidence, Reducer, Stage
from illava.reduction.evidence import DECODER_EVIDENCE
from illava.reduction.probe import AttentionProbe
from illava.reduction.scopes import PackedPrompts, Selection
from illava.requests import TraceStep, derive_seed
from illava.tokens import Assignment, Tokens, embed_in_batch


def size_bias(plan: ReductionPlan, prompts: PackedPrompts) -> Tensor | None:
    """What every layer adds to the scores of each token's key, float32 [T]; None where the plan has no `size_bias`."""
    return prompts.size_T.log() if plan.size_bias and prompts.size_T is not None else None


@dataclass(frozen=True, slots=True)
class _Site:
    """One reduction step: where it acts, its reducer, and the tokens it may touch."""

    stage: Stage
    layer: int | None
    reducer: Reducer
    chosen: Selection
    scope_T: Tensor
    index_N: Tensor


class DecoderReduction:
    """Carries out the decoder reductions of one packed prefill.

    Args:
        plan: the plan of all requests in it.
        seeds: an integer per request, the root of what reducers draw.
        traced: requests, by row of the batch, whose mixing matrices are copied to the host.
        scale: factor of the decoder's attention.
        probe: is given every layer's attention that `apply` is given.

    Attributes:
        errors: requests for which a step was a no-op although they have visual tokens.
        traces: the steps of each traced request.
    """

    def __init__(
        self,
        plan: ReductionPlan,
        *,
        seeds: Sequence[int],
        traced: Sequence[int],
        scale: float,
        probe: AttentionProbe | None = None,
    ) -> None:
        self._plan, self._seeds, self._scale, self._probe = plan, seeds, scale, probe
        self.errors: dict[int, ReductionDidNotFireError] = {}
        self.traces: dict[int, list[TraceStep]] = {row: [] for row in traced}
        self._sized = any("sizes" in s.reducer.evidence(s.stage) for s in plan.steps if s.stage in DECODER_EVIDENCE)

    def apply(
        self,
        prompts: PackedPrompts,
        stage: Stage,
        layer: int | None = None,
        *,
        qk: tuple[Tensor, Tensor] | None = None,
        own_qk: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> PackedPrompts:
        """Reduce what enters ``layer`` if the plan says so; else return the same object.

        Args:
            prompts: the output of the layer before.
            stage: ``decoder_input`` or ``decoder_layer``.
            layer: the layer about to run, at ``decoder_layer``.
            qk: rotated queries and keys of the layer before, which score the tokens; None behind a recurrent layer.
            own_qk: computes those of the layer about to run, over all these tokens; called if a reducer asks for it.
        """
        if self._probe is not None and qk is not None and layer is not None:
            bias_T = size_bias(self._plan, prompts)
            seen_T = last_query_attention(*qk, prompts.lengths, scale=self._scale, key_bias_T=bias_T)
            self._probe(stage, layer - 1, seen_T[prompts.coord_T4[:, 0] >= 0])
        reducer = self._plan.at(stage, layer)
        if reducer is None:
            return prompts
        if not prompts.counts.knows(reducer):
            prompts = prompts.measured()
        chosen = prompts.counts.select(reducer)
        if self._sized and prompts.size_T is None:  # visual tokens since they entered the decoder
            ones_T = prompts.hidden_TD.new_ones(prompts.hidden_TD.shape[0], dtype=torch.float32)
            prompts = replace(prompts, size_T=ones_T)
        after = prompts
        if chosen.lengths:
            scope_T = chosen.scope_T(prompts.span_T)
            site = _Site(stage, layer, reducer, chosen, scope_T, chosen.index_N(scope_T))
            tokens = Tokens(prompts.hidden_TD[site.index_N], chosen.lengths, prompts.coord_T4[site.index_N, 1:])
            assignment = reducer.assign(tokens, self._evidence(site, prompts, qk, own_qk), stage)
            counts = prompts.counts.reduced(chosen, assignment.lengths)
            whole = embed_in_batch(assignment, site.index_N, prompts.span_T.shape[0], counts.lengths)
            after = prompts.reduced(whole, counts)
            self._record(site, prompts, after, whole)
        if not reducer.may_keep_all:
            self._note_noop(prompts, after, f"{reducer.kind!r} at {stage}{'' if layer is None else f' {layer}'}")
        return after

    def _evidence(
        self,
        site: _Site,
        prompts: PackedPrompts,
        qk: tuple[Tensor, Tensor] | None,
        own_qk: Callable[[], tuple[Tensor, Tensor]] | None,
    ) -> Evidence:
        kinds, lengths, index_N = site.reducer.evidence(site.stage), prompts.lengths, site.index_N
        found: dict[str, Any] = {}
        if "sizes" in kinds and prompts.size_T is not None:
            found["size_T"] = prompts.size_T[index_N]
        if "seed" in kinds:
            found["seeds"] = self._scope_seeds(site)
        if site.layer is None:
            if "attention_received" in kinds:
                if prompts.score_T is None:
                    raise PlanError(f"{site.stage} is scored by the tower's attention, which this family did not give")
                found["attention_received_T"] = prompts.score_T[index_N]
            return Evidence(**found)
        bias_T = size_bias(self._plan, prompts)
        if "own_layer_query_attention" in kinds and own_qk is not None:
            score_T = last_query_attention(*own_qk(), lengths, scale=self._scale, key_bias_T=bias_T)
            found["own_layer_query_attention_T"] = score_T[index_N]
        if qk is None:
            return Evidence(**found)
        q_THd, k_TGd = qk
        for kind, normalised in (("attention_received", False), ("causal_normalised_attention", True)):
            if kind in kinds:
                score_T = causal_attention_received(
                    q_THd, k_TGd, lengths, site.scope_T,
                    scale=self._scale, normalised=normalised, key_bias_T=bias_T,
                )  # fmt: skip
                found[f"{kind}_T"] = score_T[index_N]
        if "last_query_attention" in kinds:
            score_T = last_query_attention(q_THd, k_TGd, lengths, scale=self._scale, key_bias_T=bias_T)
            found["last_query_attention_T"] = score_T[index_N]
        if "keys" in kinds:
            found["keys_THd"] = k_TGd[index_N]
        return Evidence(**found)

    def _scope_seeds(self, site: _Site) -> tuple[int, ...]:
        """A seed for every scope, from its request's root seed and its number among that request's scopes."""
        requests = site.chosen.requests
        return tuple(
            derive_seed(self._seeds[request], site.stage, site.layer or 0, n - requests.index(request))
            for n, request in enumerate(requests)
        )

    def _note_noop(self, before: PackedPrompts, after: PackedPrompts, what: str) -> None:
        pairs = zip(before.counts.num_visual, after.counts.num_visual, strict=True)
        for row, (had, has) in enumerate(pairs):
            if had and has == had:
                self.errors[row] = ReductionDidNotFireError(
                    f"{what} removed none of {had} visual tokens; lower its budget or take the step out of the plan"
                )

    def _record(self, site: _Site, before: PackedPrompts, after: PackedPrompts, whole: Assignment) -> None:
        if not self.traces:
            return
        matrix = whole.matrix().cpu()
        for row, steps in self.traces.items():
            index_out, index_in = after.visual_index(row), before.visual_index(row)
            own = matrix.index_select(0, index_out.cpu()).index_select(1, index_in.cpu()).coalesce()
            steps.append(TraceStep(site.stage, site.layer, own, after.coord_T4[index_out].cpu()))

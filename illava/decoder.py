"""The language model's block loop over layers borrowed from Hugging Face: packed prefill and paged decode.

Weights, norms, projections, MLPs and rotary tables are the loaded model's own modules; the loop is ours, so that
prompts of different lengths lie end to end and tokens may be reduced before any layer. With no reduction its logits
equal the borrowed model's. Knows no family, no media and no reducer.

Shape suffixes: T packed tokens, B requests, D model width, H query heads, G key/value heads, d head width, P rotary
axes, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from illava.attention import packed_attention, paged_attention
from illava.cache import BatchPages, PagedCache
from illava.decoder_reduction import DecoderReduction, check_decoder_steps
from illava.errors import ModelLoadError, ReductionDidNotFireError
from illava.plan import ReductionPlan
from illava.requests import TraceStep
from illava.scopes import PackedPrompts

_Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Prefill:
    """What a packed prefill leaves behind. All counts are of the tensors that ran.

    Attributes:
        logits_BV: after each request's last token.
        lengths_LB: tokens of each request in each layer, by layer.
        num_visual_LB: visual tokens among them.
        errors: what ended one request alone; its neighbours' results stand.
        traces: decoder steps of the requests that asked for them.
    """

    logits_BV: Tensor
    lengths_LB: list[tuple[int, ...]]
    num_visual_LB: list[tuple[int, ...]]
    errors: dict[int, ReductionDidNotFireError]
    traces: dict[int, list[TraceStep]]


class Decoder:
    """A causal language model in two verbs.

    Args:
        text_model: Hugging Face text model with `layers`, `norm`, `rotary_emb` (Qwen2, Llama, Mistral, Qwen3, ...).
        lm_head: its output projection.

    Raises:
        ModelLoadError: the model has sliding windows, or rotary tables that change with the input.
    """

    def __init__(self, text_model: Any, lm_head: Any) -> None:
        self.layers, self.norm, self.rotary = list(text_model.layers), text_model.norm, text_model.rotary_emb
        self.lm_head, config, attention = lm_head, text_model.config, text_model.layers[0].self_attn
        self.num_layers, self.num_kv_heads = len(self.layers), config.num_key_value_heads
        self.head_dim, self.scale, self.max_positions = (
            attention.head_dim,
            attention.scaling,
            config.max_position_embeddings,
        )
        if _slides(self.layers, config):
            raise ModelLoadError(
                "this decoder has sliding-window layers; only full causal attention is built. Take a model whose "
                "text_config has sliding_window null or use_sliding_window false"
            )
        if getattr(self.rotary, "rope_type", "default") in ("dynamic", "longrope"):
            raise ModelLoadError(f"rotary tables of type {self.rotary.rope_type!r} change with the input: not built")

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def check(self, plan: ReductionPlan) -> None:
        """Raise PlanError for decoder steps that cannot run here."""
        check_decoder_steps(plan, self.num_layers)

    @torch.inference_mode()
    def prefill(
        self,
        prompts: PackedPrompts,
        plan: ReductionPlan,
        cache: PagedCache,
        pages: BatchPages,
        *,
        seeds: Sequence[int],
        traced: Sequence[int] = (),
    ) -> Prefill:
        """Run packed prompts of one plan through all layers; keys and values stay in the cache.

        Args:
            prompts: B requests; the logits wanted are those of each one's last token.
            plan: its `decoder_input` and `decoder_layer` steps act here.
            cache: receives every layer's keys and values, reduced ones from the reduced layer on.
            pages: the requests' page tables; their counts are not read.
            seeds: an integer per request, the root of what reducers draw.
            traced: requests, by place in the batch, whose mixing matrices are wanted on the host.
        """
        reduction = DecoderReduction(plan, seeds=seeds, traced=traced, scale=self.scale)
        lengths_LB, num_visual_LB = [], []
        entering = reduction.apply(prompts, "decoder_input")
        rotary, qk = self._rotary(entering.hidden_TD, entering.position_PT), None
        for n, layer in enumerate(self.layers):
            prompts = reduction.apply(entering, "decoder_layer", n, qk=qk)
            if prompts is not entering:
                rotary = self._rotary(prompts.hidden_TD, prompts.position_PT)
            lengths = prompts.lengths
            if sum(lengths) != prompts.hidden_TD.shape[0]:
                raise RuntimeError(f"layer {n} has {prompts.hidden_TD.shape[0]} tokens; counted were {sum(lengths)}")
            q_THd, k_TGd, v_TGd = qkv = self._project(layer, prompts.hidden_TD, rotary)
            cache.write(cache.prompt_slots(pages.table_LBM[n], lengths), k_TGd, v_TGd)
            lengths_LB.append(lengths)
            num_visual_LB.append(prompts.counts.num_visual)
            if n < self.num_layers - 1:
                mixed_THd = packed_attention(*qkv, lengths, causal=True, scale=self.scale)
                hidden_TD = self._finish(layer, prompts.hidden_TD, mixed_THd)
                if prompts.deepstack:
                    hidden_TD = hidden_TD + prompts.deepstack[0]
                entering = replace(prompts, hidden_TD=hidden_TD, deepstack=prompts.deepstack[1:])
                qk = q_THd, k_TGd
        # Of the last layer only the last tokens' outputs are read: ask for them as a decode step does.
        length_B = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        last_B = length_B.cumsum(0) - 1
        mixed_BHd = self._paged(q_THd[last_B], cache, pages.table_LBM[-1], length_B, lengths)
        logits_BV = self.lm_head(self.norm(self._finish(layer, prompts.hidden_TD[last_B], mixed_BHd)))
        return Prefill(logits_BV, lengths_LB, num_visual_LB, reduction.errors, reduction.traces)

    @torch.inference_mode()
    def decode(self, hidden_BD: Tensor, position_PB: Tensor, cache: PagedCache, pages: BatchPages) -> Tensor:
        """One more token for each request: its embedding in, logits [B, V] out; the pages' counts grow by one."""
        pages.grow()
        slot_LB = cache.last_slots(pages)
        rotary = self._rotary(hidden_BD, position_PB)
        for n, layer in enumerate(self.layers):
            q_BHd, k_BGd, v_BGd = self._project(layer, hidden_BD, rotary)
            cache.write(slot_LB[n], k_BGd, v_BGd)
            mixed_BHd = self._paged(q_BHd, cache, pages.table_LBM[n], pages.length_LB[n], pages.host_lengths[n])
            hidden_BD = self._finish(layer, hidden_BD, mixed_BHd)
        return self.lm_head(self.norm(hidden_BD))

    def _paged(
        self, q_BHd: Tensor, cache: PagedCache, table_BM: Tensor, length_B: Tensor, host_lengths: Sequence[int]
    ) -> Tensor:
        pools = cache.k_pool_PSGd, cache.v_pool_PSGd
        return paged_attention(q_BHd, *pools, table_BM, length_B, scale=self.scale, host_lengths=host_lengths)

    def _rotary(self, hidden_TD: Tensor, position_PT: Tensor) -> _Rotary:
        """Cosines and sines at each token's own position: [T, 1, d] each."""
        position_1T = position_PT if position_PT.shape[0] == 1 else position_PT[:, None]  # M-RoPE: [axes, batch, T]
        cos_1Td, sin_1Td = self.rotary(hidden_TD[None], position_1T)
        return cos_1Td[0, :, None], sin_1Td[0, :, None]

    def _project(self, layer: Any, hidden_TD: Tensor, rotary: _Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys, and values of one layer."""
        attention, x_TD = layer.self_attn, layer.input_layernorm(hidden_TD)
        q_THd, k_TGd, v_TGd = (
            project(x_TD).unflatten(-1, (-1, self.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q_THd, k_TGd = attention.q_norm(q_THd), attention.k_norm(k_TGd)
        return _rotate(q_THd, *rotary), _rotate(k_TGd, *rotary), v_TGd

    def _finish(self, layer: Any, hidden_TD: Tensor, mixed_THd: Tensor) -> Tensor:
        """The rest of a block after attention: output projection, residuals and MLP."""
        hidden_TD = hidden_TD + layer.self_attn.o_proj(mixed_THd.flatten(1))
        return hidden_TD + layer.mlp(layer.post_attention_layernorm(hidden_TD))


def _slides(layers: Sequence[Any], config: Any) -> bool:
    """Whether a layer sees a window only. Qwen2's layers say so themselves; for Mistral's the configuration does."""
    if hasattr(layers[0].self_attn, "sliding_window"):
        return any(layer.self_attn.sliding_window for layer in layers)
    return bool(getattr(config, "sliding_window", None))


def _rotate(x_THd: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention."""
    left, right = x_THd.chunk(2, -1)
    return x_THd * cos_T1d + torch.cat((-right, left), -1) * sin_T1d

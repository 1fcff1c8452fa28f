"""Runs the language model's layers, which are borrowed from Hugging Face, over packed tokens.

Weights, norms, projections, MLPs and rotary tables are the loaded model's own modules. The loop over them is ours, so
that prompts of different lengths lie end to end and tokens may be reduced before any layer. Without a reduction the
logits equal the borrowed model's. `illava.decoder.prefill` runs a packed prefill. Knows no family, no media and no
reducer.

Shape suffixes: T packed tokens, B requests, D model width, H query heads, G key/value heads, d head width, P rotary
axes, L layers, V vocabulary, M channels within the MLP, X rows of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from illava.attention.paged import paged_attention
from illava.decoder.joined_linears import products
from illava.decoder.kv_cache import BatchBlockTables, LayerBlockTable, PagedCache
from illava.decoder.layer_ops import Rotary, add_rms_norm, rms_norm, rotate_and_write, silu_mul
from illava.errors import ModelLoadError
from illava.plan import ReductionPlan
from illava.reduction.evidence import check_decoder_steps

_CPU_ROWS = 64  # 1 MiB at Qwen2-0.5B's width: half of an L2 cache


class Decoder:
    """Runs a causal language model: single layers for `illava.decoder.prefill`, and decode steps of a whole batch.

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
        join = self.device.type == "cuda"
        self._qkv, self._gate_up = {}, {}
        for layer in self.layers:
            own, mlp = layer.self_attn, layer.mlp
            self._qkv[layer] = products([own.q_proj, own.k_proj, own.v_proj], join=join)
            if not _has_experts(layer):
                self._gate_up[layer] = products([mlp.gate_proj, mlp.up_proj], join=join)
        if join:
            torch.cuda.empty_cache()  # of what the layers' own weights took: pools are sized by free memory

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def has_experts(self) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return any(map(_has_experts, self.layers))

    @property
    def num_tokens(self) -> int:
        """Logits of a token; a tokenizer may know fewer."""
        return self.lm_head.weight.shape[0]

    def check(self, plan: ReductionPlan) -> None:
        """Raise PlanError for decoder steps that cannot run here."""
        check_decoder_steps(plan, self.num_layers)

    @torch.inference_mode()
    def decode(self, hidden_BD: Tensor, position_PB: Tensor, cache: PagedCache, blocks: BatchBlockTables) -> Tensor:
        """Decode one more token of each request: embeddings [B, D] -> logits [B, V]; cached lengths grow by one."""
        blocks.grow()
        slot_LB = cache.last_slots(blocks)
        rotary = self.rotary_at(hidden_BD, position_PB)
        for n, layer in enumerate(self.layers):
            q_BHd, _, _ = self.project(layer, hidden_BD, rotary, into=(cache, slot_LB[n]))
            mixed_BHd = self.attend_paged(q_BHd, cache, blocks.layer(n))
            hidden_BD = self.finish(layer, hidden_BD, mixed_BHd)
        return self.head(hidden_BD)

    def head(self, hidden_BD: Tensor) -> Tensor:
        """Logits behind the last layer: [B, V]."""
        return self.lm_head(rms_norm(self.norm, hidden_BD))

    def attend_paged(self, q_BHd: Tensor, cache: PagedCache, blocks: LayerBlockTable) -> Tensor:
        """Attend with one query per request over its cached keys of one layer."""
        return paged_attention(
            q_BHd,
            cache.k_pool_PSGd,
            cache.v_pool_PSGd,
            blocks.table_BM,
            blocks.length_B,
            scale=self.scale,
            host_lengths=blocks.host_lengths,
            host_starts=blocks.host_starts,
            bias_pool_PS=None if blocks.num_biased_B is None else cache.bias_pool_PS,
            num_biased_B=blocks.num_biased_B,
            host_num_biased=blocks.host_num_biased,
        )

    def rotary_at(self, hidden_TD: Tensor, position_PT: Tensor) -> Rotary:
        """Cosines and sines at each token's own position: [T, 1, d] each."""
        position_1T = position_PT if position_PT.shape[0] == 1 else position_PT[:, None]  # M-RoPE: [axes, batch, T]
        cos_1Td, sin_1Td = self.rotary(hidden_TD[None], position_1T)
        return cos_1Td[0, :, None], sin_1Td[0, :, None]

    def project(
        self, layer: Any, hidden_TD: Tensor, rotary: Rotary, *, into: tuple[PagedCache, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys, and values of one layer; ``into``: the cache, and the slots that take them."""
        attention, x_TD = layer.self_attn, rms_norm(layer.input_layernorm, hidden_TD)
        q_THd, k_TGd, v_TGd = (part.unflatten(-1, (-1, self.head_dim)) for part in self._qkv[layer](x_TD))
        if hasattr(attention, "q_norm"):
            q_THd, k_TGd = rms_norm(attention.q_norm, q_THd), rms_norm(attention.k_norm, k_TGd)
        q_THd, k_TGd = rotate_and_write(q_THd, k_TGd, v_TGd, rotary, into)
        return q_THd, k_TGd, v_TGd

    def finish(self, layer: Any, hidden_TD: Tensor, mixed_THd: Tensor) -> Tensor:
        """The rest of a block after attention: output projection, residuals and MLP."""
        delta_TD = layer.self_attn.o_proj(mixed_THd.flatten(1))
        hidden_TD, normed_TD = add_rms_norm(layer.post_attention_layernorm, hidden_TD, delta_TD)
        if layer not in self._gate_up:  # a token's experts are its own: who else is packed beside it changes nothing
            return hidden_TD + layer.mlp(normed_TD[None])[0]
        if not hidden_TD.is_cuda and len(hidden_TD) > _CPU_ROWS:
            return hidden_TD + _mlp_in_place(layer.mlp, normed_TD)
        gate_TM, up_TM = self._gate_up[layer](normed_TD)
        return hidden_TD + layer.mlp.down_proj(silu_mul(layer.mlp.act_fn, gate_TM, up_TM))


def _has_experts(layer: Any) -> bool:
    """Whether the layer's MLP is a mixture of experts, which routes every token by itself and runs as a whole."""
    return hasattr(layer.mlp, "experts")


def _mlp_in_place(mlp: Any, normed_TD: Tensor) -> Tensor:
    """Hugging Face's own forward, with half of its wide results: on CPU each is fresh memory, zeroed page by page."""
    gate_TM, up_TM = mlp.gate_proj(normed_TD), mlp.up_proj(normed_TD)
    for gate_XM, up_XM in zip(gate_TM.split(_CPU_ROWS), up_TM.split(_CPU_ROWS), strict=True):
        torch.mul(mlp.act_fn(gate_XM), up_XM, out=gate_XM)
    return mlp.down_proj(gate_TM)


def _slides(layers: Sequence[Any], config: Any) -> bool:
    """Whether a layer sees a window only. Qwen2's layers say so themselves; for Mistral's the configuration does."""
    if hasattr(layers[0].self_attn, "sliding_window"):
        return any(layer.self_attn.sliding_window for layer in layers)
    return bool(getattr(config, "sliding_window", None))

"""Runs the language model's layers, which are borrowed from Hugging Face, over packed tokens.

Weights, norms, projections, MLPs and rotary tables are the loaded model's own modules. The loop over them is ours, so
that prompts of different lengths lie end to end and tokens may be reduced before any layer. Without a reduction the
logits equal the borrowed model's. A layer attends (`Decoder.project`, then attention), or it is recurrent and keeps a
state instead of keys (`illava.decoder.gated_delta`); both end in `Decoder.feed_forward`. `illava.decoder.prefill` runs
a packed prefill. Knows no family, no media and no reducer.

Shape suffixes: T packed tokens, B requests, D model width, H query heads, G key/value heads, d head width, P rotary
axes, L layers, V vocabulary, M channels within the MLP, X rows of a slice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from illava.attention.paged import paged_attention
from illava.decoder.joined_linears import products
from illava.decoder.kv_cache import BatchBlockTables, LayerBlockTable, PagedCache
from illava.decoder.layer_ops import Rotary, add_rms_norm, rms_norm, rotate_and_write, silu_mul
from illava.decoder.onednn_linears import activation_of, is_plain, linear, serves
from illava.decoder.recurrent_state import RecurrentStates, StateRows
from illava.decoder.state_shape import StateShape
from illava.errors import ModelLoadError
from illava.plan import ReductionPlan
from illava.reduction.evidence import check_decoder_steps

if TYPE_CHECKING:
    from illava.decoder.gated_delta import GatedDelta

_CPU_ROWS = 64  # 1 MiB at Qwen2-0.5B's width: half of an L2 cache


class Projected(NamedTuple):
    """What a layer's attention takes: rotated queries, rotated keys, values; the gate of its output, if it has one."""

    q_THd: Tensor
    k_TGd: Tensor
    v_TGd: Tensor
    gate_THd: Tensor | None = None


class Decoder:
    """Runs a causal language model: single layers for `illava.decoder.prefill`, and decode steps of a whole batch.

    Args:
        text_model: Hugging Face text model with `layers`, `norm`, `rotary_emb` (Qwen2, Llama, Mistral, Qwen3, ...).
        lm_head: its output projection.

    Raises:
        ModelLoadError: the model has sliding windows, rotary tables that change with the input, or a last layer that
            is recurrent.

    Attributes:
        kv_layers: the layers that keep keys and values; the others are recurrent.
        kv_index: of each of these, its number among them, by which the cache knows it.
        recurrent: the token mixing of each other layer.
        state_shape: of the recurrent layers' states; None without such layers.
    """

    def __init__(self, text_model: Any, lm_head: Any) -> None:
        self.layers, self.norm, self.rotary = list(text_model.layers), text_model.norm, text_model.rotary_emb
        self.kv_layers = tuple(n for n, layer in enumerate(self.layers) if hasattr(layer, "self_attn"))
        self.kv_index = {layer: number for number, layer in enumerate(self.kv_layers)}
        if len(self.layers) - 1 not in self.kv_index:
            raise ModelLoadError(
                "this decoder's last layer is recurrent; only decoders that end in full attention are built. Take a "
                "model whose layer_types end in full_attention"
            )
        self.lm_head, config, attention = lm_head, text_model.config, self.layers[-1].self_attn
        self.num_layers, self.num_kv_heads = len(self.layers), config.num_key_value_heads
        self.head_dim, self.scale, self.max_positions = (
            attention.head_dim,
            attention.scaling,
            config.max_position_embeddings,
        )
        if _slides([self.layers[n] for n in self.kv_layers], config):
            raise ModelLoadError(
                "this decoder has sliding-window layers; only full causal attention is built. Take a model whose "
                "text_config has sliding_window null or use_sliding_window false"
            )
        self._rotary_forward = _fixed_rotary(self.rotary, config)
        join = self.device.type == "cuda"
        self._qkv, self._gate_up = {}, {}
        for layer in self.layers:
            mlp, own = layer.mlp, getattr(layer, "self_attn", None)
            if own is not None:
                self._qkv[layer] = products([own.q_proj, own.k_proj, own.v_proj], join=join)
            if not _has_experts(layer):
                self._gate_up[layer] = products([mlp.gate_proj, mlp.up_proj], join=join)
        if join:
            torch.cuda.empty_cache()  # of what the layers' own weights took: pools are sized by free memory
        self.recurrent, self.state_shape = _recurrent(self.layers)

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
    def num_position_axes(self) -> int:
        """Rotary axes of a token's position: three where the tables have sections (M-RoPE), else one."""
        return 3 if "mrope_section" in (getattr(self.rotary.config, "rope_parameters", None) or {}) else 1

    @property
    def num_tokens(self) -> int:
        """Logits of a token; a tokenizer may know fewer."""
        return int(self.lm_head.out_features)

    def linears(self) -> list[Any]:
        """The linear layers that `illava.decoder.onednn_linears` may compute."""
        found = [self.lm_head]
        for layer in self.layers:
            own, mlp = getattr(layer, "self_attn", None), layer.mlp
            found += [] if own is None else [own.q_proj, own.k_proj, own.v_proj, own.o_proj]
            found += [] if _has_experts(layer) else [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        return found

    def check(self, plan: ReductionPlan) -> None:
        """Raise PlanError for decoder steps that cannot run here."""
        check_decoder_steps(plan, self.num_layers, self.kv_layers)

    @torch.inference_mode()
    def decode(self, hidden_BD: Tensor, position_PB: Tensor, cache: PagedCache, blocks: BatchBlockTables) -> Tensor:
        """Decode one more token of each request: embeddings [B, D] -> logits [B, V]; cached lengths grow by one."""
        blocks.grow()
        slot_LB = cache.last_slots(blocks)
        rotary = self.rotary_at(hidden_BD, position_PB)
        for n, layer in enumerate(self.layers):
            if n in self.recurrent:
                states, rows = recurrent_of(cache, blocks)
                mixed_BD = self.recurrent[n].step(rms_norm(layer.input_layernorm, hidden_BD), states, rows.slot_B)
                hidden_BD = self.feed_forward(layer, hidden_BD, mixed_BD)
                continue
            number = self.kv_index[n]
            projected = self.project(layer, hidden_BD, rotary, into=(cache, slot_LB[number]))
            mixed_BHd = self.attend_paged(projected.q_THd, cache, blocks.layer(number))
            hidden_BD = self.finish(layer, hidden_BD, mixed_BHd, projected.gate_THd)
        return self.head(hidden_BD)

    def head(self, hidden_BD: Tensor) -> Tensor:
        """Logits behind the last layer: [B, V]."""
        return linear(self.lm_head, rms_norm(self.norm, hidden_BD))

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
        cos_1Td, sin_1Td = self._rotary_forward(hidden_TD[None], position_1T)
        return cos_1Td[0, :, None], sin_1Td[0, :, None]

    def project(
        self, layer: Any, hidden_TD: Tensor, rotary: Rotary, *, into: tuple[PagedCache, Tensor] | None = None
    ) -> Projected:
        """What attention takes of one layer; ``into``: the cache, and the slots that take keys and values."""
        attention, x_TD = layer.self_attn, rms_norm(layer.input_layernorm, hidden_TD)
        q_TX, *keys_values = self._qkv[layer](x_TD)
        q_THd, gate_THd = self._queries(attention, q_TX)
        k_TGd, v_TGd = (part.unflatten(-1, (-1, self.head_dim)) for part in keys_values)
        if hasattr(attention, "q_norm"):
            q_THd, k_TGd = rms_norm(attention.q_norm, q_THd), rms_norm(attention.k_norm, k_TGd)
        q_THd, k_TGd = rotate_and_write(q_THd, k_TGd, v_TGd, rotary, into)
        return Projected(q_THd, k_TGd, v_TGd, gate_THd)

    def _queries(self, attention: Any, q_TX: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries, and the gates that a gated attention's projection has behind those of each head."""
        q_THd = q_TX.unflatten(-1, (-1, self.head_dim))
        if attention.q_proj.out_features == attention.o_proj.in_features:
            return q_THd, None
        q_THd, gate_THd = q_TX.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        return q_THd, gate_THd

    def finish(self, layer: Any, hidden_TD: Tensor, mixed_THd: Tensor, gate_THd: Tensor | None = None) -> Tensor:
        """The rest of a block after attention: the gate where there is one, output projection, residuals and MLP."""
        if gate_THd is not None:
            mixed_THd = mixed_THd * gate_THd.sigmoid()
        return self.feed_forward(layer, hidden_TD, linear(layer.self_attn.o_proj, mixed_THd.flatten(1)))

    def feed_forward(self, layer: Any, hidden_TD: Tensor, delta_TD: Tensor) -> Tensor:
        """The rest of a block after its token mixing, which gave ``delta_TD``: residuals and MLP."""
        hidden_TD, normed_TD = add_rms_norm(layer.post_attention_layernorm, hidden_TD, delta_TD)
        if layer not in self._gate_up:  # a token's experts are its own: who else is packed beside it changes nothing
            return hidden_TD + layer.mlp(normed_TD[None])[0]
        if _fuses_mlp(layer.mlp):
            return _fused_mlp(layer.mlp, hidden_TD, normed_TD)
        if not hidden_TD.is_cuda and len(hidden_TD) > _CPU_ROWS and is_plain(layer.mlp.gate_proj):
            return hidden_TD + _mlp_in_place(layer.mlp, normed_TD)
        gate_TM, up_TM = self._gate_up[layer](normed_TD)
        return hidden_TD + linear(layer.mlp.down_proj, silu_mul(layer.mlp.act_fn, gate_TM, up_TM))


def _fixed_rotary(rotary: Any, config: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What computes cosines and sines, where they do not depend on what else is computed.

    Tables of type ``dynamic`` (InternVL3) change beyond the positions that the model has, where no request comes; the
    module's own test whether they are reached would wait for the device.

    Raises:
        ModelLoadError: tables that change with the input.
    """
    kind = getattr(rotary, "rope_type", "default")
    if kind == "dynamic":
        own, most = getattr(config, "rope_parameters", None) or {}, config.max_position_embeddings
        if own.get("original_max_position_embeddings", most) >= most:
            return partial(inspect.unwrap(type(rotary).forward), rotary)
    if kind in ("dynamic", "longrope"):
        raise ModelLoadError(f"rotary tables of type {kind!r} change with the input: not built")
    return rotary  # type: ignore[no-any-return]


def _has_experts(layer: Any) -> bool:
    """Whether the layer's MLP is a mixture of experts, which routes every token by itself and runs as a whole."""
    return hasattr(layer.mlp, "experts")


def recurrent_of(cache: PagedCache, blocks: BatchBlockTables) -> tuple[RecurrentStates, StateRows]:
    """The states of a decoder's recurrent layers, and where those of a batch lie."""
    if cache.states is None or blocks.states is None:
        raise RuntimeError("this cache holds no recurrent states: build it with make_cache")
    return cache.states, blocks.states


def _recurrent(layers: Sequence[Any]) -> tuple[dict[int, GatedDelta], StateShape | None]:
    """The token mixing of every recurrent layer, and the shape of their states."""
    own = [n for n, layer in enumerate(layers) if not hasattr(layer, "self_attn")]
    if not own:
        return {}, None
    from illava.decoder.gated_delta import GatedDelta, state_shape

    mixing = {layer: GatedDelta(layers[layer].linear_attn, number) for number, layer in enumerate(own)}
    return mixing, state_shape([layers[layer] for layer in own])


def _fuses_mlp(mlp: Any) -> bool:
    """Whether oneDNN computes an MLP's products, and its activation within one of them."""
    parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return all(map(serves, parts)) and activation_of(mlp.act_fn) is not None


def _fused_mlp(mlp: Any, hidden_TD: Tensor, normed_TD: Tensor) -> Tensor:
    """The residual stream with the MLP added, in three calls."""
    gate_TM = linear(mlp.gate_proj, normed_TD, activation=activation_of(mlp.act_fn) or "none")
    return linear(mlp.down_proj, linear(mlp.up_proj, normed_TD, times_TN=gate_TM), plus_TN=hidden_TD)


def _mlp_in_place(mlp: Any, normed_TD: Tensor) -> Tensor:
    """Hugging Face's own forward, with half of its wide results: on CPU each is fresh memory, zeroed page by page."""
    gate_TM, up_TM = linear(mlp.gate_proj, normed_TD), linear(mlp.up_proj, normed_TD)
    for gate_XM, up_XM in zip(gate_TM.split(_CPU_ROWS), up_TM.split(_CPU_ROWS), strict=True):
        torch.mul(mlp.act_fn(gate_XM), up_XM, out=gate_XM)
    return linear(mlp.down_proj, gate_TM)


def _slides(layers: Sequence[Any], config: Any) -> bool:
    """Whether a layer sees a window only. Qwen2's layers say so themselves; for Mistral's the configuration does."""
    if hasattr(layers[0].self_attn, "sliding_window"):
        return any(layer.self_attn.sliding_window for layer in layers)
    return bool(getattr(config, "sliding_window", None))

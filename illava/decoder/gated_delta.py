"""Runs Gated DeltaNet layers over packed tokens: the recurrent kind of decoder layer, which keeps a state and no keys.

Projections, convolution weights, norms and the delta rule itself are Hugging Face's. On a GPU transformers puts kernels
of `flash-linear-attention` and `causal-conv1d` in their place where these are installed, and says where they are not; a
CPU has no such kernels. This module lays requests of different lengths side
by side for it, carries their states from call to call, and takes snapshots on the way. Tokens that fill a row up change
no state: they neither write (beta is 0) nor decay it (its logarithm is 0).

Source: transformers 5.23, models/qwen3_5/modeling_qwen3_5.py:Qwen3_5GatedDeltaNet.

Shape suffixes: T packed tokens, R requests of a call, X tokens of the longest of them, D model width, C convolved
channels, W inputs that the convolution looks back on, H value heads, G key heads, k key width, v value width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    causal_conv1d_fn,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from illava.decoder.recurrent_state import RecurrentStates, StateRows
from illava.decoder.state_shape import StateShape
from illava.host_copies import on_device

# Tokens of a request in one call: bounds the float32 copies that the rule makes, and what filling up wastes. A multiple
# of the rule's own chunks (64), so that a long prompt is cut where the rule would cut it.
_CALL_TOKENS = 1024

_Span = tuple[int, int, int]  # request, its first and its end token


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring tokens of one request: where they lie among the packed ones, and what follows."""

    row: int
    begin: int
    end: int
    keeps: bool  # the state behind them is the request's snapshot


def state_shape(layers: Sequence[Any]) -> StateShape:
    """The sizes that these layers' states have, as Hugging Face's modules say."""
    first = layers[0].linear_attn
    return StateShape(
        num_layers=len(layers),
        num_channels=first.conv_dim,
        look_back=first.conv_kernel_size - 1,
        num_heads=first.num_v_heads,
        key_width=first.head_k_dim,
        value_width=first.head_v_dim,
    )


class GatedDelta:
    """Runs one layer's token mixing.

    Args:
        module: Hugging Face's Gated DeltaNet.
        number: which of the recurrent layers it is.
    """

    def __init__(self, module: Any, number: int) -> None:
        self._module, self._number = module, number

    def step(self, x_RD: Tensor, states: RecurrentStates, slot_R: Tensor) -> Tensor:
        """Mix one more token of each request into its state: [R, D]. Reads nothing back to the host."""
        projected = self._project(x_RD[:, None])
        mixed_R1Hv = self._rule(projected, states, slot_R, None)
        return self._output(mixed_R1Hv[:, 0], x_RD)

    def run(
        self,
        x_TD: Tensor,
        spans: Sequence[_Span],
        states: RecurrentStates,
        rows: StateRows,
        places: Sequence[int | None],
    ) -> Tensor:
        """Mix a chunk of packed prompts into their states: [T, D].

        Args:
            x_TD: the layer's normed input.
            spans: the requests' tokens that it holds, in packed order.
            states: hold what went before; are advanced.
            rows: where the requests' states lie.
            places: before which token of a request its state is kept as a snapshot; None for no snapshot.
        """
        projected = self._project(x_TD)
        mixed_THv = torch.empty_like(projected[0][..., : self._module.value_dim]).unflatten(
            -1, (-1, self._module.head_v_dim)
        )
        for pieces in _calls(spans, places):
            slot_R = on_device([rows.slots[piece.row] for piece in pieces], x_TD.device, torch.long)
            qkv_RXC, beta_RXH, decay_RXH = (
                pad_sequence([value_T[piece.begin : piece.end] for piece in pieces], batch_first=True)
                for value_T in projected
            )
            lengths = [piece.end - piece.begin for piece in pieces]
            mixed_RXHv = self._rule((qkv_RXC, beta_RXH, decay_RXH), states, slot_R, lengths)
            for row, piece in enumerate(pieces):
                mixed_THv[piece.begin : piece.end] = mixed_RXHv[row, : lengths[row]]
                if piece.keeps:
                    states.keep(self._number, rows, piece.row)
        return self._output(mixed_THv, x_TD)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of the convolution [..., C]; what a token writes and what it lets decay, float32 [..., H]."""
        module = self._module
        decay = -module.A_log.float().exp() * softplus(module.in_proj_a(x).float() + module.dt_bias)
        return module.in_proj_qkv(x), module.in_proj_b(x).sigmoid(), decay

    def _rule(
        self,
        projected: tuple[Tensor, Tensor, Tensor],
        states: RecurrentStates,
        slot_R: Tensor,
        lengths: Sequence[int] | None,
    ) -> Tensor:
        """Convolve, and apply the delta rule to the states in these slots: [R, X, H, v]; no lengths: one token each."""
        module, (qkv_RXC, beta_RXH, decay_RXH) = self._module, projected
        conv_SCW, state_SHkv = states.conv_LSCW[self._number], states.state_LSHkv[self._number]
        joined_RCX = torch.cat([conv_SCW.index_select(0, slot_R), qkv_RXC.transpose(1, 2)], -1)
        look_back = states.shape.look_back
        newest = [joined_RCX[row, :, n : n + look_back] for row, n in enumerate(lengths or ())]
        conv_SCW.index_copy_(0, slot_R, joined_RCX[..., 1:] if lengths is None else torch.stack(newest))
        convolved_RCX = _for_device(causal_conv1d_fn, joined_RCX)(
            joined_RCX, module.conv1d.weight.squeeze(1), module.conv1d.bias, activation=module.activation
        )
        sizes = [module.key_dim, module.key_dim, module.value_dim]
        widths = [module.head_k_dim, module.head_k_dim, module.head_v_dim]
        parts = convolved_RCX[..., look_back:].transpose(1, 2).split(sizes, -1)
        q_RXGk, k_RXGk, v_RXHv = (part.unflatten(-1, (-1, width)) for part, width in zip(parts, widths, strict=True))
        repeats = module.num_v_heads // module.num_k_heads  # transformers 5.17 does not repeat heads itself
        if repeats > 1:
            q_RXGk, k_RXGk = (value.repeat_interleave(repeats, dim=2) for value in (q_RXGk, k_RXGk))
        rule = torch_recurrent_gated_delta_rule if lengths is None else torch_chunk_gated_delta_rule
        mixed_RXHv, after_RHkv = _for_device(rule, q_RXGk)(
            q_RXGk,
            k_RXGk,
            v_RXHv,
            g=decay_RXH,
            beta=beta_RXH,
            initial_state=state_SHkv.index_select(0, slot_R),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        state_SHkv.index_copy_(0, slot_R, after_RHkv.to(state_SHkv.dtype))
        return mixed_RXHv

    def _output(self, mixed_THv: Tensor, x_TD: Tensor) -> Tensor:
        """Norm, gate and output projection, as they follow the rule: [T, D]."""
        module = self._module
        gate_THv = module.in_proj_z(x_TD).unflatten(-1, (-1, module.head_v_dim))
        normed = module.norm(mixed_THv.flatten(0, 1), gate_THv.flatten(0, 1))
        return module.out_proj(normed.view(len(x_TD), -1))


def _for_device(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Hugging Face's function as it chooses kernels, on a GPU; on a CPU its own formula."""
    return function if x.is_cuda else inspect.unwrap(function)


def _calls(spans: Sequence[_Span], places: Sequence[int | None]) -> Iterator[list[_Piece]]:
    """Cut the requests' tokens at snapshots and every `_CALL_TOKENS`; the first piece of all, then the second, ..."""
    starts = [0, *accumulate(end - begin for _, begin, end in spans)]
    cut = [list(_pieces(span, places[span[0]], start)) for span, start in zip(spans, starts, strict=False)]
    for together in zip_longest(*cut):
        yield [piece for piece in together if piece is not None]


def _pieces(span: _Span, place: int | None, start: int) -> Iterator[_Piece]:
    row, begin, end = span
    kept = place is not None and begin < place <= end
    parts = [(begin, place), (place, end)] if kept and place is not None else [(begin, end)]
    for first, stop in parts:
        for own, upto in pairwise([*range(first, stop, _CALL_TOKENS), stop]):
            yield _Piece(row, start + own - begin, start + upto - begin, kept and upto == place)

"""Runs the small operations of a decoder layer as one Triton kernel each, in half precision.

Norm with the residual's addition, rotation with the write to the cache, gate times up. Each rounds where the borrowed
model rounds, so that `illava.decoder.layer_ops`, the reference, gives the same numbers up to the order of a sum. A
decode step is a third of the kernels, and a prefill reads and writes a third of the bytes.

Shape suffixes: T tokens, D channels, H query heads, G key/value heads, d head width, M channels within the MLP, S slots
of the pool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MLP_BLOCK = 1024


def add_norm(x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of both, or ``x_TD`` itself, and its RMS norm: [T, D] each."""
    x_TD, num_channels = x_TD.contiguous(), x_TD.shape[-1]
    delta_TD = None if delta_TD is None else delta_TD.contiguous()
    sum_TD = x_TD if delta_TD is None else torch.empty_like(x_TD)
    normed_TD = torch.empty_like(x_TD)
    num_rows = x_TD.numel() // num_channels
    if num_rows:
        _add_norm[(num_rows,)](
            x_TD, x_TD if delta_TD is None else delta_TD, weight_D, sum_TD, normed_TD, eps,
            HAS_DELTA=delta_TD is not None, NUM_CHANNELS=num_channels,
            BLOCK_D=triton.next_power_of_2(num_channels), num_warps=4 if num_channels <= 2048 else 8,
        )  # fmt: skip
    return sum_TD, normed_TD


def rotate_and_write(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    rotary: tuple[Tensor, Tensor],
    pools: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Rotate queries and keys in place; put keys and values into their slots.

    Args:
        q_THd: queries; a head's channels lie side by side.
        k_TGd: keys, likewise.
        v_TGd: values, likewise.
        rotary: cosines and sines, [T, 1, d] each.
        pools: int64 slots [T], and the pools of keys and of values; None writes nothing.
    """
    (num_tokens, num_heads, head_dim), num_kv_heads = q_THd.shape, k_TGd.shape[1]
    cos_Td, sin_Td = (x.reshape(num_tokens, head_dim).contiguous() for x in rotary)
    slot_T, k_pool, v_pool = (cos_Td, k_TGd, v_TGd) if pools is None else pools  # never touched where none are written
    if not num_tokens:
        return
    _rotate_write[(num_tokens,)](
        q_THd, k_TGd, v_TGd, cos_Td, sin_Td, slot_T, k_pool, v_pool,
        q_THd.stride(0), q_THd.stride(1), k_TGd.stride(0), k_TGd.stride(1), v_TGd.stride(0), v_TGd.stride(1),
        WRITE=pools is not None, HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_H=triton.next_power_of_2(num_heads), BLOCK_G=triton.next_power_of_2(num_kv_heads),
        BLOCK_D=triton.next_power_of_2(head_dim // 2),
    )  # fmt: skip


def silu_mul(gate_TM: Tensor, up_TM: Tensor) -> Tensor:
    """SiLU of the gate times the up-projection: [T, M]; each row lies in one piece."""
    num_rows, num_channels = gate_TM.shape
    out_TM = torch.empty(num_rows, num_channels, dtype=gate_TM.dtype, device=gate_TM.device)
    if num_rows:
        _silu_mul[(num_rows, triton.cdiv(num_channels, _MLP_BLOCK))](
            gate_TM, up_TM, out_TM, gate_TM.stride(0), up_TM.stride(0), NUM_CHANNELS=num_channels, BLOCK=_MLP_BLOCK
        )
    return out_TM


@triton.jit
def _add_norm(
    x, delta, weight, total, normed, eps,
    HAS_DELTA: tl.constexpr, NUM_CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row: the sum is rounded, then its norm is, before and after the weight, as the borrowed model does."""
    row, dim_D = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    valid_D = dim_D < NUM_CHANNELS
    at_D = row * NUM_CHANNELS + dim_D
    x_D = tl.load(x + at_D, mask=valid_D, other=0.0)
    if HAS_DELTA:
        x_D = (x_D.to(tl.float32) + tl.load(delta + at_D, mask=valid_D, other=0.0).to(tl.float32)).to(x_D.dtype)
        tl.store(total + at_D, x_D, mask=valid_D)
    wide_D = x_D.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide_D * wide_D, 0) / NUM_CHANNELS + eps)
    unit_D = (wide_D * scale).to(x_D.dtype).to(tl.float32)
    weight_D = tl.load(weight + dim_D, mask=valid_D, other=0.0).to(tl.float32)
    tl.store(normed + at_D, (unit_D * weight_D).to(x_D.dtype), mask=valid_D)


@triton.jit
def _rotated(a_Hd, b_Hd, cos_d, sin_d):
    """``a cos + b sin``, each product rounded, as the borrowed model does."""
    first_Hd = (a_Hd.to(tl.float32) * cos_d[None, :].to(tl.float32)).to(a_Hd.dtype).to(tl.float32)
    second_Hd = (b_Hd.to(tl.float32) * sin_d[None, :].to(tl.float32)).to(a_Hd.dtype).to(tl.float32)
    return first_Hd, second_Hd


@triton.jit
def _rotate_write(
    q, k, v, cos, sin, slot, k_pool, v_pool,
    stride_qt, stride_qh, stride_kt, stride_kg, stride_vt, stride_vg,
    WRITE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token: all its heads, both halves of each."""
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = HEAD_DIM // 2
    dim_d = tl.arange(0, BLOCK_D)
    is_dim_d = dim_d < half
    at = token * HEAD_DIM + dim_d
    cos_left_d = tl.load(cos + at, mask=is_dim_d, other=0.0)
    cos_right_d = tl.load(cos + at + half, mask=is_dim_d, other=0.0)
    sin_left_d = tl.load(sin + at, mask=is_dim_d, other=0.0)
    sin_right_d = tl.load(sin + at + half, mask=is_dim_d, other=0.0)

    head_H, head_G = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_G)
    valid_Hd = (head_H < HEADS)[:, None] & is_dim_d[None, :]
    at_Hd = token * stride_qt + head_H[:, None] * stride_qh + dim_d[None, :]
    left_Hd = tl.load(q + at_Hd, mask=valid_Hd, other=0.0)
    right_Hd = tl.load(q + at_Hd + half, mask=valid_Hd, other=0.0)
    first_Hd, second_Hd = _rotated(left_Hd, right_Hd, cos_left_d, sin_left_d)
    tl.store(q + at_Hd, (first_Hd - second_Hd).to(left_Hd.dtype), mask=valid_Hd)
    first_Hd, second_Hd = _rotated(right_Hd, left_Hd, cos_right_d, sin_right_d)
    tl.store(q + at_Hd + half, (first_Hd + second_Hd).to(left_Hd.dtype), mask=valid_Hd)

    valid_Gd = (head_G < KV_HEADS)[:, None] & is_dim_d[None, :]
    at_Gd = token * stride_kt + head_G[:, None] * stride_kg + dim_d[None, :]
    left_Gd = tl.load(k + at_Gd, mask=valid_Gd, other=0.0)
    right_Gd = tl.load(k + at_Gd + half, mask=valid_Gd, other=0.0)
    first_Gd, second_Gd = _rotated(left_Gd, right_Gd, cos_left_d, sin_left_d)
    new_left_Gd = (first_Gd - second_Gd).to(left_Gd.dtype)
    first_Gd, second_Gd = _rotated(right_Gd, left_Gd, cos_right_d, sin_right_d)
    new_right_Gd = (first_Gd + second_Gd).to(left_Gd.dtype)
    tl.store(k + at_Gd, new_left_Gd, mask=valid_Gd)
    tl.store(k + at_Gd + half, new_right_Gd, mask=valid_Gd)
    if WRITE:
        into_Gd = (tl.load(slot + token) * KV_HEADS + head_G[:, None]) * HEAD_DIM + dim_d[None, :]
        tl.store(k_pool + into_Gd, new_left_Gd, mask=valid_Gd)
        tl.store(k_pool + into_Gd + half, new_right_Gd, mask=valid_Gd)
        from_Gd = token * stride_vt + head_G[:, None] * stride_vg + dim_d[None, :]
        tl.store(v_pool + into_Gd, tl.load(v + from_Gd, mask=valid_Gd, other=0.0), mask=valid_Gd)
        tl.store(v_pool + into_Gd + half, tl.load(v + from_Gd + half, mask=valid_Gd, other=0.0), mask=valid_Gd)


@triton.jit
def _silu_mul(gate, up, out, stride_g, stride_u, NUM_CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of one row; the activation is rounded before the product, as the borrowed model does."""
    row, dim_M = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid_M = dim_M < NUM_CHANNELS
    gate_M = tl.load(gate + row * stride_g + dim_M, mask=valid_M, other=0.0)
    wide_M = gate_M.to(tl.float32)
    active_M = (wide_M / (1.0 + tl.exp(-wide_M))).to(gate_M.dtype).to(tl.float32)
    up_M = tl.load(up + row * stride_u + dim_M, mask=valid_M, other=0.0).to(tl.float32)
    tl.store(out + row * NUM_CHANNELS + dim_M, (active_M * up_M).to(gate_M.dtype), mask=valid_M)

"""Computes attention over packed sequences: of whole segments, and of chunks, by the backend of the device.

Towers and decoder call the same functions on every machine. `illava.attention.backend.backend_name` says which backend
serves there; no backend is tried and silently dropped.

Shape suffixes: T tokens packed end to end, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from illava.attention import bfloat16_cpu
from illava.attention.backend import AttentionBackend, backend_name, check_cudnn
from illava.attention.cpu_biased import biased_attention, biased_chunks
from illava.attention.segments import of_one_length, packed_again, query_blocks
from illava.host_copies import constant_on, device_cache, on_device


def packed_attention(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    lengths: Sequence[int],
    *,
    causal: bool,
    scale: float,
    key_bias_T: Tensor | None = None,
) -> Tensor:
    """Attention within each segment of a packed batch: [T, H, d].

    Args:
        q_THd: queries; H is a multiple of G.
        k_TGd: keys of the same tokens.
        v_TGd: values of the same tokens.
        lengths: tokens per segment, host integers that sum to T.
        causal: each token sees itself and what lies before it in its segment.
        scale: factor on q.k.
        key_bias_T: float32, added to every score of that key, in all heads; see `with_key_bias`.
    """
    return packed_attention_lse(q_THd, k_TGd, v_TGd, lengths, causal=causal, scale=scale, key_bias_T=key_bias_T)[0]


def packed_attention_lse(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    lengths: Sequence[int],
    *,
    causal: bool,
    scale: float,
    key_bias_T: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`packed_attention`, and the log-sum-exp of each query's scores where the backend computes it: float32 [H, T].

    Only the packed FlashAttention gives it away. It is what attention scores begin with (`illava.attention.scores`).
    """
    lengths = tuple(lengths)
    if sum(lengths) != q_THd.shape[0]:
        raise ValueError(f"segments of {sum(lengths)} tokens in all, but {q_THd.shape[0]} queries were given")
    if not lengths:
        return torch.empty_like(q_THd), None
    if key_bias_T is not None and _takes_bias(q_THd):
        return biased_attention(q_THd, k_TGd, v_TGd, lengths, key_bias_T, causal=causal, scale=scale), None
    if key_bias_T is not None:
        width = v_TGd.shape[-1]
        q_THd, k_TGd = with_key_bias(q_THd, k_TGd, key_bias_T, scale=scale)
        v_TGd = _wider(v_TGd, constant_on((0.0,) * (k_TGd.shape[-1] - width), v_TGd.device, v_TGd.dtype))
        out_THd, lse_HT = packed_attention_lse(q_THd, k_TGd, v_TGd, lengths, causal=causal, scale=scale)
        return out_THd[..., :width], lse_HT
    backend = backend_name(q_THd.device, q_THd.dtype, q_THd.shape[-1])
    if backend == "varlen" or (backend == "cudnn" and len(set(lengths)) > 1):
        has = _varlen_arguments(q_THd.device, q_THd.dtype)
        return _varlen(q_THd, k_TGd, v_TGd, lengths, causal=causal, scale=scale, has=has)
    return _sdpa(q_THd, k_TGd, v_TGd, lengths, causal=causal, scale=scale, backend=backend), None


def _takes_bias(q_THd: Tensor) -> bool:
    """Whether the kernel that serves these queries takes a bias itself (`illava.attention.cpu_biased`)."""
    return q_THd.device.type == "cpu" and backend_name(q_THd.device, q_THd.dtype, q_THd.shape[-1]) == "sdpa"


def with_key_bias(q_THd: Tensor, k_TGd: Tensor, key_bias_T: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose product is scale q.k + bias_k; the bias is in extra channels, since kernels take none.

    The key's extra entry is bias / scale, the query's is 1. In half precision a second entry holds the rounding error
    of the first. The width stays a multiple of 8, as the kernels need.
    """
    over_scale_T = key_bias_T / scale
    parts = [over_scale_T.to(k_TGd.dtype)]
    if k_TGd.dtype != torch.float32:
        parts.append((over_scale_T - parts[0]).to(k_TGd.dtype))
    num_empty = -(k_TGd.shape[-1] + len(parts)) % 8
    empty_1 = constant_on((0.0,) * num_empty, k_TGd.device, k_TGd.dtype)
    ones_1 = constant_on((1.0,) * len(parts), q_THd.device, q_THd.dtype)
    return _wider(q_THd, ones_1, empty_1), _wider(k_TGd, *(part_T[:, None, None] for part_T in parts), empty_1)


def _wider(x_THd: Tensor, *extra: Tensor) -> Tensor:
    """Append channels to all heads, in one kernel."""
    return torch.cat([x_THd, *(value.expand(*x_THd.shape[:2], -1) for value in extra)], -1)


def chunk_attention(
    q_CHd: Tensor,
    k_UGd: Tensor,
    v_UGd: Tensor,
    lengths: Sequence[int],
    key_lengths: Sequence[int],
    *,
    scale: float,
    key_bias_U: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last tokens of each segment over all its keys: [C, H, d].

    Args:
        q_CHd: queries of the last ``lengths[s]`` tokens of each segment.
        k_UGd: keys of all ``key_lengths[s]`` tokens of each segment.
        v_UGd: values of the same tokens.
        lengths: queries per segment, host integers that sum to C.
        key_lengths: keys per segment, host integers that sum to U.
        scale: factor on q.k.
        key_bias_U: float32, added to every score of that key, in all heads; see `with_key_bias`.
    """
    lengths, key_lengths = tuple(lengths), tuple(key_lengths)
    if key_bias_U is not None and _takes_bias(q_CHd):
        return biased_chunks(q_CHd, k_UGd, v_UGd, lengths, key_lengths, key_bias_U=key_bias_U, scale=scale)
    if key_bias_U is not None:
        width = v_UGd.shape[-1]
        q_CHd, k_UGd = with_key_bias(q_CHd, k_UGd, key_bias_U, scale=scale)
        v_UGd = _wider(v_UGd, constant_on((0.0,) * (k_UGd.shape[-1] - width), v_UGd.device, v_UGd.dtype))
        return chunk_attention(q_CHd, k_UGd, v_UGd, lengths, key_lengths, scale=scale)[..., :width]
    backend = backend_name(q_CHd.device, q_CHd.dtype, q_CHd.shape[-1])
    if backend in ("varlen", "cudnn"):
        has = _varlen_arguments(q_CHd.device, q_CHd.dtype)
        return _varlen(q_CHd, k_UGd, v_UGd, lengths, causal=True, scale=scale, has=has, key_lengths=key_lengths)[0]
    parts = zip(q_CHd.split(lengths), k_UGd.split(key_lengths), v_UGd.split(key_lengths), strict=True)
    with _kernels_of(backend):
        return torch.cat([_last_queries(*part, scale) for part in parts])


def _last_queries(q_CHd: Tensor, k_UGd: Tensor, v_UGd: Tensor, scale: float) -> Tensor:
    """One segment, with our own mask."""
    outputs = []
    for q, seen, sees_BU in query_blocks(q_CHd, k_UGd, v_UGd):
        k, v, shared = _key_heads(q, *seen)
        out = scaled_dot_product_attention(q, k, v, attn_mask=sees_BU, scale=scale, enable_gqa=shared)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _sdpa(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    lengths: tuple[int, ...],
    *,
    causal: bool,
    scale: float,
    backend: AttentionBackend = "sdpa",
) -> Tensor:
    """Call SDPA once for neighbouring segments of one length: a batch of frames is one call, as in transformers."""
    if bfloat16_cpu.serves(q_THd, lengths):
        return bfloat16_cpu.attend(q_THd, k_TGd, v_TGd, lengths, causal=causal, scale=scale)
    if backend == "cudnn":
        check_cudnn(q_THd.device, q_THd.dtype, q_THd.shape[-1])
    outputs = []
    for _, (q, *own) in of_one_length(lengths, q_THd, k_TGd, v_TGd):
        k, v, shared = _key_heads(q, *own)
        with _kernels_of(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)
        outputs.append(packed_again(out))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _key_heads(q_SHNd: Tensor, k_SGUd: Tensor, v_SGUd: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Keys and values as SDPA is to have them, and whether it shares their heads among the queries'."""
    share = q_SHNd.shape[1] // k_SGUd.shape[1]
    if share == 1 or _shares_heads(q_SHNd.device):
        return k_SGUd, v_SGUd, share > 1
    return k_SGUd.repeat_interleave(share, 1), v_SGUd.repeat_interleave(share, 1), False


def _kernels_of(backend: AttentionBackend) -> AbstractContextManager[Any]:
    """Let SDPA run on one of its backends alone; it raises where that one cannot serve."""
    if backend not in ("cudnn", "math"):
        return nullcontext()
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION if backend == "cudnn" else SDPBackend.MATH)


def _shares_heads(device: torch.device) -> bool:
    """Whether SDPA there shares key heads in a fused kernel; elsewhere it would make an N x N map.

    On CUDA only FlashAttention shares heads for sure, and its inputs go to the varlen backend.
    """
    return device.type != "cuda"


@device_cache(64)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Cumulative segment bounds, int32; cached, since every layer of a prefill needs the same ones."""
    with torch.inference_mode(False):  # training may save for backward what inference cached
        return on_device([0, *accumulate(lengths)], device, torch.int32)


@lru_cache(maxsize=8)
def _varlen_arguments(device: torch.device, dtype: torch.dtype) -> frozenset[str]:
    """The arguments of `varlen_attn` that this torch has and this device supports; found by one tiny call.

    Between torch 2.10 and 2.13 ``is_causal`` became ``window_size=(-1, 0)``, and ``scale``, ``enable_gqa`` and
    ``num_splits`` came in. ``num_splits=1`` makes a row independent of its batch, but not every kernel takes it.
    """
    from torch.nn.attention.varlen import varlen_attn

    has = frozenset(inspect.signature(varlen_attn).parameters)
    probe_THd = torch.zeros(8, 2, 64, device=device, dtype=dtype)
    try:
        _varlen(probe_THd, probe_THd, probe_THd, (8,), causal=True, scale=0.125, has=has)
    except RuntimeError:
        has -= {"num_splits"}
        _varlen(probe_THd, probe_THd, probe_THd, (8,), causal=True, scale=0.125, has=has)
    return has


def _varlen(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    lengths: tuple[int, ...],
    *,
    causal: bool,
    scale: float,
    has: frozenset[str],
    key_lengths: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Call torch's packed FlashAttention with the argument names of the installed torch; also gives log-sum-exps.

    With more keys than queries in a segment its causal mask is aligned to the ends of both.
    """
    from torch.nn.attention import varlen

    given: dict[str, Any] = {"num_splits": 1} if "num_splits" in has else {}
    if "window_size" in has:
        given["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        given["is_causal"] = causal
    if "scale" in has:
        given["scale"] = scale
    else:
        q_THd = q_THd * (scale * q_THd.shape[-1] ** 0.5)
    if q_THd.shape[1] != k_TGd.shape[1] and "enable_gqa" in has:
        given["enable_gqa"] = True
    elif q_THd.shape[1] != k_TGd.shape[1]:
        share = q_THd.shape[1] // k_TGd.shape[1]
        k_TGd, v_TGd = k_TGd.repeat_interleave(share, 1), v_TGd.repeat_interleave(share, 1)
    key_lengths = lengths if key_lengths is None else key_lengths
    bounds, key_bounds = _bounds(lengths, q_THd.device), _bounds(key_lengths, q_THd.device)
    if "return_aux" in has:
        given["return_aux"] = varlen.AuxRequest(lse=True)  # the kernel writes it in any case
    found: Any = varlen.varlen_attn(q_THd, k_TGd, v_TGd, bounds, key_bounds, max(lengths), max(key_lengths), **given)
    if "return_aux" not in has:
        return found, None
    out_THd, lse_HT = found
    if lse_HT.shape != (q_THd.shape[1], q_THd.shape[0]):
        raise RuntimeError(
            f"this torch's varlen_attn gives log-sum-exps of shape {list(lse_HT.shape)}, not [heads, tokens]; set "
            "ILLAVA_ATTENTION=sdpa, or install a torch within the bounds of pyproject.toml"
        )
    return out_THd, lse_HT

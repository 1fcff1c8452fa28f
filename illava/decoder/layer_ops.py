"""Does the small operations of a decoder layer: norms, rotation, the write to the cache, and the MLP's activation.

In half precision each is one Triton kernel where `kernels_on` says so (`illava.decoder.triton_layers`); elsewhere, and
in float32, it is what the borrowed model's own modules do, which is also the kernels' reference. A module that is not
what it seems (a norm of another formula, another activation) runs as it is.

Shape suffixes: T tokens, D channels, H query heads, G key/value heads, d head width, M channels within the MLP.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from illava.attention.backend import kernels_on

if TYPE_CHECKING:
    from illava.decoder.kv_cache import PagedCache

Rotary = tuple[Tensor, Tensor]
_HALF = (torch.float16, torch.bfloat16)


def fuses(x: Tensor) -> bool:
    """Whether Triton kernels serve tensors like this one here."""
    return x.dtype in _HALF and kernels_on(x.device) == "triton"


def rms_norm(norm: Any, x_TD: Tensor) -> Tensor:
    """Apply a borrowed norm; torch's own kernel (CUDA, half precision, no Triton) rounds once, the module twice."""
    if x_TD.dtype not in _HALF or not _is_known(norm):
        return norm(x_TD)
    if fuses(x_TD):
        return add_rms_norm(norm, x_TD, None)[1]
    if x_TD.is_cuda:
        return torch.nn.functional.rms_norm(x_TD, x_TD.shape[-1:], norm.weight, norm.variance_epsilon)
    return norm(x_TD)


def add_rms_norm(norm: Any, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add what a sublayer gave to the residual stream; the sum, and its norm by a borrowed module."""
    if fuses(x_TD) and _is_known(norm):
        from illava.decoder.triton_layers import add_norm

        return add_norm(x_TD, delta_TD, norm.weight, norm.variance_epsilon)
    sum_TD = x_TD if delta_TD is None else x_TD + delta_TD
    return sum_TD, rms_norm(norm, sum_TD)


def rotate_and_write(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, rotary: Rotary, into: tuple[PagedCache, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys; keys and values are put into slots of the cache, where it is given.

    The kernel rotates in place: the caller's queries and keys are gone.
    """
    whole = rotary[0].shape[-1] == q_THd.shape[-1]  # the kernel rotates all channels of a head
    if fuses(q_THd) and all(x.stride(-1) == 1 for x in (q_THd, k_TGd, v_TGd)) and q_THd.shape[-1] % 2 == 0 and whole:
        from illava.decoder import triton_layers

        pools = None if into is None else (into[1], into[0].k_pool_PSGd, into[0].v_pool_PSGd)
        triton_layers.rotate_and_write(q_THd, k_TGd, v_TGd, rotary, pools)
        return q_THd, k_TGd
    q_THd, k_TGd = rotate(q_THd, *rotary), rotate(k_TGd, *rotary)
    if into is not None:
        cache, slot_T = into
        cache.write(slot_T, k_TGd, v_TGd)
    return q_THd, k_TGd


def rotate(x_THd: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention; channels beyond the tables' width stay as they are."""
    width = cos_T1d.shape[-1]
    if width < x_THd.shape[-1]:
        return torch.cat([rotate(x_THd[..., :width], cos_T1d, sin_T1d), x_THd[..., width:]], -1)
    left, right = x_THd.chunk(2, -1)
    return x_THd * cos_T1d + torch.cat((-right, left), -1) * sin_T1d


def silu_mul(activation: Any, gate_TM: Tensor, up_TM: Tensor) -> Tensor:
    """The activation of the gate times the up-projection: [T, M]."""
    if fuses(gate_TM) and type(activation).__name__ in ("SiLU", "SiLUActivation"):
        from illava.decoder import triton_layers

        return triton_layers.silu_mul(gate_TM, up_TM)
    return activation(gate_TM) * up_TM


def _is_known(norm: Any) -> bool:
    kind: Any = type(norm)
    return _is_rms_norm(kind)


@lru_cache(maxsize=16)
def _is_rms_norm(kind: type) -> bool:
    """Whether modules of this class compute ``weight x / sqrt(mean x^2 + eps)``; found by one small vector."""
    if not kind.__name__.endswith("RMSNorm"):
        return False
    with torch.inference_mode(False), torch.no_grad():
        module, x_D = kind(4), torch.tensor([0.5, -1.0, 2.0, 3.0])
        if not hasattr(module, "variance_epsilon"):
            return False
        module.weight.copy_(torch.tensor([1.0, 0.5, 2.0, -1.0]))
        expected_D = module.weight * x_D * (x_D.pow(2).mean() + module.variance_epsilon).rsqrt()
        return bool(torch.allclose(module(x_D), expected_D, rtol=1e-6))

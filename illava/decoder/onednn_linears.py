"""Computes linear layers in bfloat16 on CPU from weights packed for oneDNN, with what follows them in the same call.

A plain product packs its weight anew in every call, which is half of a decode step and a tenth of a prefill; what
follows it (an activation, a product, the residual) is another pass over memory. Only processors that multiply bfloat16
natively are served. Elsewhere, and for layers that compute more than a product, the borrowed module runs as it is.

Results differ from the module's by rounding: oneDNN applies what follows before it rounds to bfloat16.

Shape suffixes: T tokens, D input channels, N output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from illava.devices import has_native_bfloat16

Activation = Literal["none", "silu", "gelu", "gelu_tanh"]
_POINTWISE: dict[Activation, tuple[str, str]] = {
    "none": ("none", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
_KNOWN: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class _Packed:
    """A weight in oneDNN's own layout, and which values it was made of."""

    weight: Tensor
    address: int
    version: int


_packed: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()
_owned: WeakSet[nn.Module] = WeakSet()


def is_plain(linear: Any) -> bool:
    """Whether a layer computes ``x weight^T + bias`` from its weight's own values, which may then be read.

    Quantised layers and layers with an adapter do more: either the module is of another class, or, as torchao has it,
    its weight is a tensor that wraps others.
    """
    return type(linear) is nn.Linear and not is_traceable_wrapper_subclass(linear.weight)


def serves(linear: Any) -> bool:
    """Whether this layer is computed from a packed weight here."""
    weight = getattr(linear, "weight", None)
    if weight is None or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and weight.numel():  # a packed product has no gradient
        return False
    return has_native_bfloat16() and is_plain(linear) and _has_onednn()


def keep_packed_only(*linears: Any) -> None:
    """Let these layers' plain weights go when they are packed, at their first product: no weight is held twice.

    Nothing but `linear` can run them from then on: for models that nobody else holds. An output head that shares the
    word embeddings' weight must not be among them.
    """
    _owned.update(linears)


def activation_of(module: Any) -> Activation | None:
    """The activation that can be computed within a product; None for any other."""
    if type(module) is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    return _KNOWN.get(type(module).__name__)


def linear(
    module: Any,
    x_TD: Tensor,
    *,
    activation: Activation = "none",
    times_TN: Tensor | None = None,
    plus_TN: Tensor | None = None,
) -> Tensor:
    """One linear layer: [T, D] -> [T, N], then at most one of an activation, a product and a sum.

    Where `serves` says no, what follows must not be asked for.
    """
    if not serves(module):
        if activation != "none" or times_TN is not None or plus_TN is not None:
            raise ValueError(f"{type(module).__name__} is not served by oneDNN here: it runs alone")
        return module(x_TD)
    weight, bias = _weight(module), module.bias
    if times_TN is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x_TD, times_TN, weight, bias, "mul")
    if plus_TN is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x_TD, plus_TN, weight, bias, "add")
    name, algorithm = _POINTWISE[activation]
    return torch.ops.mkldnn._linear_pointwise(x_TD, weight, bias, name, [], algorithm)


def _weight(module: Any) -> Tensor:
    """The layer's packed weight; packed anew where the layer's own values have changed."""
    own, found = module.weight, _packed.get(module)
    if found is not None and (own.numel() == 0 or (found.address, found.version) == _identity(own)):
        return found.weight
    packed = torch.ops.mkldnn._reorder_linear_weight(own.detach())
    _packed[module] = _Packed(packed, *_identity(own))
    if module in _owned:
        own.data = own.data.new_empty(0)
    return packed


def _identity(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

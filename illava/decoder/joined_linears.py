"""Computes several linear layers of one input as one product: queries, keys and values; gate and up-projection.

The joined weight takes the place of the layers' own, which become views of it: no weight is held twice, and the
borrowed model still runs on them. On CPU the layers stay apart, where one product brings nothing; each is computed by
`illava.decoder.onednn_linears`.

Shape suffixes: T tokens, D input channels, N output channels of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from illava.decoder.onednn_linears import is_plain, linear

Products = Callable[[Tensor], tuple[Tensor, ...]]  # of one input, the output of each layer


def products(linears: Sequence[Any], *, join: bool) -> Products:
    """What computes these layers: one product if ``join`` and all are plain linear layers alike, else each its own."""
    if not join or not _are_alike(linears):
        return lambda x_TD: tuple(linear(module, x_TD) for module in linears)
    sizes = [linear.out_features for linear in linears]
    weight_ND = _joined([linear.weight for linear in linears])
    bias_N = None if linears[0].bias is None else _joined([linear.bias for linear in linears])
    return lambda x_TD: nn.functional.linear(x_TD, weight_ND, bias_N).split(sizes, -1)


def _are_alike(linears: Sequence[Any]) -> bool:
    """Plain layers of one type, and all with or all without a bias."""
    if not all(map(is_plain, linears)):
        return False
    kinds = {(linear.weight.dtype, linear.weight.device, linear.in_features, linear.bias is None) for linear in linears}
    return len(kinds) == 1 and not any(p.requires_grad for linear in linears for p in linear.parameters())


@torch.no_grad()
def _joined(values: Sequence[nn.Parameter]) -> Tensor:
    joined = torch.cat([value.detach() for value in values])
    for value, part in zip(values, joined.split([len(value) for value in values]), strict=True):
        value.data = part
    return joined

"""Counted FLOPs of tower, prefill and decode: pure functions of shapes and token counts.

A multiplication and an addition are two. Matrix products and attention are counted (a causal map in full, as torch's
own counter does); norms, activations, rotary tables and lookups are not: together they stay below two per cent.
tests/benchmarks/test_flops.py holds them to `torch.utils.flop_counter` for every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One transformer layer.

    Attributes:
        projections: weights of the query, key and value projections.
        output: weights of the attention's output projection.
        mlp: weights of the MLP.
        width: query heads times head width.
    """

    projections: int
    output: int
    mlp: int
    width: int

    @classmethod
    def of(cls, attention: Any, mlp: Any, *, width: int) -> LayerShape:
        """Read off a layer's modules; what is named ``o_proj``, ``out_proj`` or ``proj`` is the output projection."""
        output = next(getattr(attention, name) for name in ("o_proj", "out_proj", "proj") if hasattr(attention, name))
        return cls(num_weights(attention) - num_weights(output), num_weights(output), num_weights(mlp), width)


def num_weights(module: Any) -> int:
    """Entries of a module's matrices and convolutions."""
    return sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)


def attention_flops(width: int, queries: Sequence[int], keys: Sequence[int]) -> int:
    """Scores and mixture of each segment's queries over its keys."""
    return 4 * width * sum(q * k for q, k in zip(queries, keys, strict=True))


def tower_flops(
    layers: Sequence[LayerShape],
    lengths: Sequence[Sequence[int]],
    left: Sequence[int],
    *,
    scored: Sequence[int] = (),
    ends: Sequence[tuple[int, int]],
) -> int:
    """A vision tower with what stands before and behind it.

    Args:
        layers: its blocks.
        lengths: tokens of each segment that attends within itself, by block.
        left: tokens that enter each block's MLP, all segments together.
        scored: blocks whose attention received is measured for a reducer: one more product of queries and keys.
        ends: (weights, rows) of patch embedding, projector or mergers.
    """
    total = sum(2 * weights * rows for weights, rows in ends)
    for block, (layer, own, mlp_tokens) in enumerate(zip(layers, lengths, left, strict=True)):
        attention = attention_flops(layer.width, own, own)
        total += 2 * sum(own) * (layer.projections + layer.output) + 2 * mlp_tokens * layer.mlp
        total += attention + (attention // 2 if block in scored else 0)
    return total


def prefill_flops(layers: Sequence[LayerShape], lengths_LB: Sequence[Sequence[int]], *, head: int) -> int:
    """Prompts of these tokens by layer; through the last layer and the head (``head`` weights) go last tokens only."""
    total = 2 * len(lengths_LB[0]) * head
    for n, (layer, lengths) in enumerate(zip(layers, lengths_LB, strict=True)):
        queries = [1] * len(lengths) if n == len(layers) - 1 else list(lengths)
        total += 2 * sum(lengths) * layer.projections + 2 * sum(queries) * (layer.output + layer.mlp)
        total += attention_flops(layer.width, queries, lengths)
    return total


def decode_flops(layers: Sequence[LayerShape], lengths_LB: Sequence[Sequence[int]], *, head: int) -> int:
    """One token of each request over the keys it then has in each layer, itself included."""
    total, batch = 2 * len(lengths_LB[0]) * head, len(lengths_LB[0])
    for layer, lengths in zip(layers, lengths_LB, strict=True):
        total += 2 * batch * (layer.projections + layer.output + layer.mlp)
        total += attention_flops(layer.width, [1] * batch, lengths)
    return total

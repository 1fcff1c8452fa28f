"""Counts FLOPs of tower, prefill and decode: each layer's own modules on meta tensors, under torch's counter.

Nothing is computed and no weight is copied. A multiplication and an addition are two, a causal map counts in full, and
norms, activations, rotary tables and lookups not at all, as `torch.utils.flop_counter` has it.
tests/benchmarks/test_flops.py holds the counts to what the counter sees in a real run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from illava.families.llava.onevision import LlavaOnevision


def tower_flops(family: LlavaOnevision, num_tiles: int, counts: Sequence[int], *, scored: Sequence[int] = ()) -> int:
    """The vision tower, patch embedding and projector included.

    Args:
        family: the model.
        num_tiles: pictures or frames.
        counts: tokens of a tile in front of each block, and behind the last; a block's MLP has the count behind it.
        scored: blocks whose attention received is measured for a reducer: one more product of queries and keys.
    """
    tower, side = family.tower, family.preprocessor.geometry.tile_px
    with _counting() as counter:
        _on_meta(tower._embeddings.patch_embedding, num_tiles, 3, side, side)
        for n, (block, before, after) in enumerate(zip(tower._blocks, counts, counts[1:], strict=False)):
            _layer(block, [before] * num_tiles, [before] * num_tiles, mlp_rows=after * num_tiles)
            if n in scored:
                query = _empty(num_tiles, block.self_attn.num_heads, before, block.self_attn.head_dim)
                query @ query.mT
        _rows(family.encoder._projector, counts[-1] * num_tiles)
    return counter.get_total_flops()


def prefill_flops(decoder: Any, lengths_LB: Sequence[Sequence[int]]) -> int:
    """Prompts of these tokens by layer; through the last layer and the head go last tokens only."""
    batch = len(lengths_LB[0])
    with _counting() as counter:
        for layer, lengths in zip(decoder.layers, lengths_LB, strict=True):
            queries = [1] * batch if layer is decoder.layers[-1] else lengths
            _layer(layer, queries, lengths, projected=sum(lengths))
        _rows(decoder.lm_head, batch)
    return counter.get_total_flops()


def decode_flops(decoder: Any, lengths_LB: Sequence[Sequence[int]]) -> int:
    """One token of each request over the keys it then has in each layer, itself included."""
    batch = len(lengths_LB[0])
    with _counting() as counter:
        for layer, lengths in zip(decoder.layers, lengths_LB, strict=True):
            _layer(layer, [1] * batch, lengths, projected=batch)
        _rows(decoder.lm_head, batch)
    return counter.get_total_flops()


def _layer(
    layer: Any,
    queries: Sequence[int],
    keys: Sequence[int],
    *,
    projected: int | None = None,
    mlp_rows: int | None = None,
) -> None:
    """One transformer layer: segments of so many queries over so many keys.

    Args:
        layer: has ``self_attn`` and ``mlp``.
        queries, keys: of each segment.
        projected: rows through the query, key and value projections; those of the queries unless said.
        mlp_rows: rows through the MLP; those of the queries unless said.
    """
    attention, num_rows = layer.self_attn, sum(queries)
    for name in ("q_proj", "k_proj", "v_proj"):
        _rows(getattr(attention, name), num_rows if projected is None else projected)
    heads = attention.q_proj.out_features // attention.head_dim
    for num_queries, num_keys in zip(queries, keys, strict=True):
        key = _empty(1, heads, num_keys, attention.head_dim)
        scaled_dot_product_attention(_empty(1, heads, num_queries, attention.head_dim), key, key)
    _rows(attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj, num_rows)
    _rows(layer.mlp, num_rows if mlp_rows is None else mlp_rows)


def _rows(module: torch.nn.Module, num_rows: int) -> None:
    first = next(part for part in module.modules() if isinstance(part, torch.nn.Linear))
    _on_meta(module, num_rows, first.in_features)


def _on_meta(module: torch.nn.Module, *shape: int) -> None:
    """A module's forward of an input of this shape, its weights replaced by their shapes."""
    weights = {name: _empty(*value.shape) for name, value in [*module.named_parameters(), *module.named_buffers()]}
    functional_call(module, weights, (_empty(*shape),))


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        yield counter

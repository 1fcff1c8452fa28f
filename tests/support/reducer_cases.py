"""A setting of every registered reducer, random ragged inputs for them, and the dense view of what they answer."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import TypeAdapter
from torch import Tensor

from illava.reducers import AnyReducer, Evidence, Reducer
from illava.tokens import Assignment, Tokens

ADAPTER = TypeAdapter(AnyReducer)
CONFIGS = [
    {"kind": "illava", "keep_ratio": 0.6},
    {"kind": "illava", "num_merged": 4},
    {"kind": "illava_2026", "keep_ratio": 0.6},
    {"kind": "illava_2026", "num_merged": 2},
    {"kind": "attention_pruning", "keep_ratio": 0.6},
    {"kind": "fastv", "keep_ratio": 0.5},
    {"kind": "random", "keep_ratio": 0.4},
    {"kind": "uniform_stride", "keep_ratio": 0.6},
    {"kind": "uniform_stride", "num_merged": 7},
    {"kind": "pooling", "grid": [2, 3]},
    {"kind": "tome", "keep_ratio": 0.6},
    {"kind": "tome", "keep_ratio": 0.5},
    {"kind": "greedy", "keep_ratio": 0.3},
    {"kind": "greedy", "num_merged": 5},
    {"kind": "kmeans", "keep_ratio": 0.4},
    {"kind": "kmeans", "keep_per_frame": 6},
    {"kind": "prumerge"},
    {"kind": "prumerge", "plus": True, "num_neighbours": 4, "saliency": "cls_attention"},
    {"kind": "visionzip", "keep_ratio": 0.5},
    {"kind": "visionzip", "keep_ratio": 0.2, "contextual_share": 0.5, "saliency": "cls_attention"},
    {"kind": "divprune", "keep_ratio": 0.5},
    {"kind": "scope", "keep_ratio": 0.5, "alpha": 0.5},
    {"kind": "vidcom2", "keep_ratio": 0.5},
    {"kind": "evs", "keep_ratio": 0.6},
    {"kind": "evs", "threshold": 0.1},
    {"kind": "flashvid", "keep_ratio": 0.4, "threshold": 0.1},
    {"kind": "fewer_frames", "keep_ratio": 0.5},
    {"kind": "fewer_frames", "keep_ratio": 0.5, "by": "packets"},
    {"kind": "lower_resolution", "keep_ratio": 0.5},
    {"kind": "pixel_prune", "threshold": 2.0},
    {"kind": "pixel_dedup", "threshold": 2.0},
    {"kind": "clip_crop", "keep_ratio": 0.5, "scorer": {"model_id": "m"}},
    {"kind": "clipseg_crop", "keep_ratio": 0.4, "scorer": {"model_id": "m"}},
    {"kind": "free_videollm", "num_slow": 1, "num_middle": 0, "fast_grid": (2, 2), "scorer": {"model_id": "m"}},
    {"kind": "bounded_error", "epsilon": 0.8},
    {"kind": "pyramiddrop"},
    {"kind": "frame_merging"},
    {"kind": "frame_merging", "num_frames": 3},
    {"kind": "tome", "keep_ratio": 0.6, "proportional_attention": True},
    {"kind": "ward", "keep_ratio": 0.3},
    {"kind": "ward", "num_merged": 5, "alpha": 0.5},
    {"kind": "ward", "keep_ratio": 0.4, "contrast": 1.0},
    {"kind": "ward", "max_merge_error": 0.8, "max_tokens": 20},
]
# (frames, rows, columns) of each segment
SHAPES = ((2, 4, 5), (1, 3, 3), (3, 2, 4), (1, 1, 1), (2, 5, 5))


def ragged(
    seed: int, shapes: tuple[tuple[int, int, int], ...] = SHAPES, *, missing: float = 0.0, dim: int = 12
) -> tuple[Tokens, Evidence]:
    """Tokens of video-like segments, all evidence with them; a share of tokens may be missing from their grids."""
    gen = torch.Generator().manual_seed(seed)
    places, lengths = [], []
    for frames, rows, cols in shapes:
        coord_T3 = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(cols)).view(-1, 3)
        stays = torch.rand(len(coord_T3), generator=gen) >= missing
        stays[0] = True
        places.append(coord_T3[stays])
        lengths.append(int(stays.sum()))
    total = sum(lengths)
    tokens = Tokens(torch.randn(total, dim, generator=gen), tuple(lengths), torch.cat(places))
    return tokens, Evidence(
        attention_received_T=torch.rand(total, generator=gen),
        causal_normalised_attention_T=torch.rand(total, generator=gen),
        last_query_attention_T=torch.rand(total, generator=gen),
        own_layer_query_attention_T=torch.rand(total, generator=gen),
        keys_THd=torch.randn(total, 3, 8, generator=gen),
        cls_attention_T=torch.rand(total, generator=gen),
        text_relevance_T=torch.rand(total, generator=gen),
        padding_T=torch.rand(total, generator=gen) < 0.2,
        size_T=torch.randint(1, 4, (total,), generator=gen).float(),
        seeds=tuple(1000 * seed + s for s in range(len(lengths))),
        packet_bytes_T=torch.randint(1, 5000, (4,), generator=gen)[tokens.coord_T3[:, 0] % 4],
    )


def segments(tokens: Tokens, evidence: Evidence) -> list[tuple[Tokens, Evidence]]:
    """Each segment on its own."""
    alone, start = [], 0
    for s, n in enumerate(tokens.lengths):
        cut = slice(start, start + n)
        own = {name: getattr(evidence, name)[cut] for name in evidence.__slots__ if name != "seeds"}
        own_tokens = Tokens(tokens.hidden_TD[cut], (n,), tokens.coord_T3[cut])
        alone.append((own_tokens, replace(evidence, **own, seeds=(evidence.seeds[s],))))
        start += n
    return alone


def dense(assignment: Assignment) -> Tensor:
    """The mixing matrix, [K, T]."""
    return assignment.matrix().to_dense()


def assign_each(reducer: Reducer, tokens: Tokens, evidence: Evidence, stage: str) -> list[Tensor]:
    """The blocks of the batch's mixing matrix, one a segment; everything outside the blocks must be zero."""
    assignment = reducer.assign(tokens, evidence, stage)
    matrix_KT, blocks, row, col = dense(assignment), [], 0, 0
    for n, k in zip(tokens.lengths, assignment.lengths, strict=True):
        blocks.append(matrix_KT[row : row + k, col : col + n].clone())
        matrix_KT[row : row + k, col : col + n] = 0
        row, col = row + k, col + n
    assert (row, col) == tuple(matrix_KT.shape)
    assert not matrix_KT.any()
    return blocks


def kept_places(matrix_KN: Tensor) -> list[int]:
    """The kept tokens of a pruning."""
    assert torch.equal(matrix_KN.sum(1), torch.ones(len(matrix_KN)))
    return matrix_KN.argmax(1).tolist()


def groups_matrix(groups: dict[int, list[int]], sizes: list[float], num_tokens: int) -> Tensor:
    """{representative: members} as a mixing matrix of size-weighted means, rows in the order of representatives."""
    matrix_KN = torch.zeros(len(groups), num_tokens)
    for row, representative in enumerate(sorted(groups)):
        total = sum(sizes[m] for m in groups[representative])
        for member in groups[representative]:
            matrix_KN[row, member] = sizes[member] / total
    return matrix_KN


def build(config):
    """A reducer and the first of its stages."""
    reducer = ADAPTER.validate_python(config)
    return reducer, sorted(reducer.stages)[0]

"""Lays out the kept tokens of one visual input for a LLaVA's LLM: features, placeholders, coordinates, scores, trace.

It either reads the kept tokens in order as full (pseudo-)grids, or restores the true grid first.

Shape suffixes: F tiles, R rows, C columns, K tokens, D channels, O placeholder tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from illava.families.llava.geometry import AnyresGeometry
from illava.families.llava.layout import TileLayout
from illava.host_copies import constant_on, to_device
from illava.preprocess import VisualInput
from illava.reduction.trace import visual_coords
from illava.requests import TraceStep
from illava.tokens import compose
from illava.visual_tokens import EncodedVisual


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """The tokens of one visual input behind tower and projector.

    Attributes:
        feature_KD: at LLM width.
        score_K: float32 attention received in the tower's last block, where the plan needs it.
        coord_K3: int64 (tile, row, col).
        representative_FRC: int64, the kept token that represents each cell of the true grid; None where the tokens are
            full square grids to be read in order: those of an unreduced tower, or the released layout's pseudo-grids.
        steps: the tower's trace steps; None where no trace is wanted.
        tiles: the tiles or frames that are kept.
        noop_steps: see `EncodedVisual`.
        merged_FRC: int64, the kept token that each cell of all tiles was merged into, -1 for a dropped cell; None where
            no sizes are wanted.
    """

    feature_KD: Tensor
    score_K: Tensor | None
    coord_K3: Tensor
    representative_FRC: Tensor | None
    steps: tuple[TraceStep, ...] | None
    tiles: tuple[int, ...]
    noop_steps: tuple[str, ...] = ()
    merged_FRC: Tensor | None = None


def lay_out(
    kept_tokens: KeptTokens, mm_item: VisualInput, geometry: AnyresGeometry, newline_D: Tensor
) -> EncodedVisual:
    """Lay out the visual input as the LLM will read it.

    Scores go through the same map as features; separators score +inf, so that they are never merged away.
    """
    num_tiles, num_original = len(kept_tokens.tiles), len(mm_item.tiles)
    restored = kept_tokens.representative_FRC is not None
    side = geometry.grid if restored else isqrt(kept_tokens.feature_KD.shape[0] // num_tiles)
    layout = TileLayout.of(mm_item.kind, num_tiles, mm_item.original_size, geometry, side)
    coord_O3 = layout.coords()
    if mm_item.kind == "video":
        coord_O3[:-1, 0] = torch.tensor(kept_tokens.tiles)[coord_O3[:-1, 0]]
    index_K = _filled(layout, kept_tokens, coord_O3.shape[0])
    placeholder_K, num_placeholders = index_K, coord_O3.shape[0]
    if restored and num_tiles < num_original:  # frames were merged: the other frames leave their placeholders open
        placeholder_K, num_placeholders = _frame_placeholders(layout, kept_tokens, num_original)
    score_K = None
    if kept_tokens.score_K is not None:
        separator = kept_tokens.score_K.new_full((1,), float("inf"))
        score_K = layout.apply(_grid(kept_tokens, kept_tokens.score_K[:, None], num_tiles, side), separator)[index_K, 0]
    feature_OD = layout.apply(_grid(kept_tokens, kept_tokens.feature_KD, num_tiles, side), newline_D)
    coord_K3 = to_device(coord_O3, index_K.device)[index_K]
    return EncodedVisual(
        feature_KD=feature_OD if index_K.shape[0] == feature_OD.shape[0] else feature_OD[index_K],
        placeholder_K=placeholder_K,
        num_placeholders=num_placeholders,
        frame_counts=_frame_counts(layout, kept_tokens.tiles, index_K.shape[0]),
        coord_K3=coord_K3,
        score_K=score_K,
        num_patches=num_original * geometry.grid**2 - mm_item.num_left_out,
        num_patches_kept=kept_tokens.feature_KD.shape[0],
        trace=_trace(layout, kept_tokens, index_K, coord_K3),
        patch_coord_P4=None if kept_tokens.steps is None else visual_coords(patch_coords(num_original, geometry.grid)),
        noop_steps=kept_tokens.noop_steps,
        size_K=None if kept_tokens.merged_FRC is None else _sizes(layout, kept_tokens, kept_tokens.merged_FRC, index_K),
    )


def patch_coords(num_tiles: int, grid: int) -> Tensor:
    """(tile, row, col) of every patch of one visual input as it enters the tower: int64 [P, 3] on the host."""
    return torch.cartesian_prod(torch.arange(num_tiles), torch.arange(grid), torch.arange(grid))


def _grid(kept_tokens: KeptTokens, value_KD: Tensor, num_tiles: int, side: int) -> Tensor:
    """Make full grids: [K, D] -> [F, side, side, D]."""
    if kept_tokens.representative_FRC is None:
        return value_KD.view(num_tiles, side, side, -1)
    return value_KD[kept_tokens.representative_FRC]


def _filled(layout: TileLayout, kept_tokens: KeptTokens, num_placeholders: int) -> Tensor:
    """The placeholders that are taken: int64 [K]. Only a restored image leaves some out."""
    if kept_tokens.representative_FRC is None or layout.kind == "video":
        return torch.arange(num_placeholders, device=kept_tokens.coord_K3.device)
    kept_FRC = torch.zeros_like(kept_tokens.representative_FRC, dtype=torch.bool)
    kept_FRC[kept_tokens.coord_K3.unbind(1)] = True
    return layout.occupied(kept_FRC).nonzero().squeeze(1)


def _sizes(layout: TileLayout, kept_tokens: KeptTokens, merged_FRC: Tensor, index_K: Tensor) -> Tensor:
    """How many placeholders of the unreduced model each token stands for: float32 [K].

    A placeholder that is taken stands for itself. Another one belongs to the placeholder of the token into which the
    cell at its centre was merged; in a video, whose frames take all their placeholders or none, to the one at its place
    in that token's frame.
    """
    device = index_K.device
    if layout.kind == "video":
        return torch.cat([_video_sizes(layout, kept_tokens, merged_FRC).flatten(), torch.ones(1, device=device)])
    cell_O, placeholder_FRC = (to_device(index, device) for index in layout.centres())
    token_O = torch.where(cell_O >= 0, merged_FRC.flatten()[cell_O.clamp(min=0)], -1)
    target_O = placeholder_FRC[kept_tokens.coord_K3.unbind(1)][token_O.clamp(min=0)]
    target_O = torch.where(token_O >= 0, target_O, -1).index_copy_(0, index_K, index_K)
    size_O = torch.zeros(cell_O.shape[0], device=device)
    return size_O.index_add_(0, target_O.clamp(min=0), (target_O >= 0).float())[index_K]


def _video_sizes(layout: TileLayout, kept_tokens: KeptTokens, merged_FRC: Tensor) -> Tensor:
    """The same for a video's frames, without the separator: [F, pooled, pooled]."""
    tiles, num_frames = constant_on(kept_tokens.tiles, merged_FRC.device), merged_FRC.shape[0]
    centre = to_device(layout.pool_centres(), merged_FRC.device)
    token_FRC = merged_FRC[:, centre][:, :, centre]
    own_F11 = torch.full((num_frames, 1, 1), -1, device=tiles.device)
    own_F11[tiles, 0, 0] = torch.arange(len(tiles), device=tiles.device)
    frame_FRC = own_F11[kept_tokens.coord_K3[token_FRC.clamp(min=0), 0], 0, 0]
    frame_FRC = torch.where(own_F11 >= 0, own_F11, torch.where(token_FRC >= 0, frame_FRC, -1))
    size_FRC = torch.zeros(len(tiles), *token_FRC.shape[1:], device=tiles.device)
    return size_FRC.scatter_add_(0, frame_FRC.clamp(min=0), (frame_FRC >= 0).float())


def _frame_placeholders(layout: TileLayout, kept_tokens: KeptTokens, num_frames: int) -> tuple[Tensor, int]:
    """The placeholders of the kept frames, as in the unreduced video, and the number of that video's placeholders."""
    per_frame, device = layout.pooled**2, kept_tokens.coord_K3.device
    first_F1 = constant_on(kept_tokens.tiles, device)[:, None] * per_frame
    placeholder_K = (first_F1 + torch.arange(per_frame, device=device)).flatten()
    num_placeholders = num_frames * per_frame + 1
    return torch.cat([placeholder_K, placeholder_K.new_full((1,), num_placeholders - 1)]), num_placeholders


def _frame_counts(layout: TileLayout, tiles: tuple[int, ...], num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Count the tokens of each frame. The parts of a tiled image are read as one, with newlines inside."""
    if layout.kind == "video":
        return (*((frame, layout.pooled**2) for frame in tiles), (-1, 1))
    if layout.kind == "single":
        return ((0, num_tokens - 1), (-1, 1))
    return ((-1, num_tokens),)


def _trace(layout: TileLayout, kept_tokens: KeptTokens, index_K: Tensor, coord_K3: Tensor) -> tuple[TraceStep, ...]:
    if kept_tokens.steps is None:
        return ()
    matrix = layout.matrix()
    if kept_tokens.representative_FRC is not None:
        representative_P = kept_tokens.representative_FRC.flatten().cpu()
        index = torch.stack([torch.arange(representative_P.shape[0]), representative_P])
        size = (representative_P.shape[0], kept_tokens.feature_KD.shape[0])
        restore = torch.sparse_coo_tensor(index, torch.ones(representative_P.shape[0]), size, check_invariants=False)
        matrix = compose(restore.coalesce(), matrix).index_select(0, index_K.cpu()).coalesce()
    return (*kept_tokens.steps, TraceStep("layout", None, matrix, visual_coords(coord_K3.cpu())))

"""One medium's surviving tokens, laid out for a LLaVA's LLM: features, slots, frames, places, scores, trace.

Chooses between reading the survivors in order as full (pseudo-)grids and restoring the true grid first. Knows no
tower, no plan and no reducer.

Shape suffixes: F tiles, R rows, C columns, K tokens, D channels, O prompt slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from illava.families.llava.geometry import AnyresGeometry
from illava.families.llava.layout import TileLayout
from illava.preprocess import VisualInput
from illava.reduction.trace import medium_place
from illava.requests import TraceStep
from illava.tokens import compose
from illava.visual_tokens import EncodedMedium


@dataclass(frozen=True, slots=True)
class Survivors:
    """One medium's tokens behind tower and projector.

    Attributes:
        feature_KD: at LLM width.
        score_K: float32 attention received in the tower's last block, where the plan needs it.
        place_K3: int64 (tile, row, col).
        owner_FRC: int64, the survivor that stands for each cell of the true grid; None where the tokens are full
            square grids to be read in order: those of an unreduced tower, or the released layout's pseudo-grids.
        steps: the tower's trace steps; None where no trace is wanted.
        tiles: the tiles or frames that still stand.
        idle_steps: see `EncodedMedium`.
    """

    feature_KD: Tensor
    score_K: Tensor | None
    place_K3: Tensor
    owner_FRC: Tensor | None
    steps: tuple[TraceStep, ...] | None
    tiles: tuple[int, ...]
    idle_steps: tuple[str, ...] = ()


def lay_out(survivors: Survivors, medium: VisualInput, geometry: AnyresGeometry, newline_D: Tensor) -> EncodedMedium:
    """The medium as the LLM will read it.

    Scores go through the same map as features; separators score +inf, so that they are never merged away.
    """
    num_tiles, num_entered = len(survivors.tiles), len(medium.tiles)
    restored = survivors.owner_FRC is not None
    side = geometry.grid if restored else isqrt(survivors.feature_KD.shape[0] // num_tiles)
    layout = TileLayout.of(medium.kind, num_tiles, medium.original_size, geometry, side)
    place_O3 = layout.places()
    if medium.kind == "video":
        place_O3[:-1, 0] = torch.tensor(survivors.tiles)[place_O3[:-1, 0]]
    index_K = _filled(layout, survivors, place_O3.shape[0])
    slot_K, num_slots = index_K, place_O3.shape[0]
    if restored and num_tiles < num_entered:  # joined frames: the others leave their slots open
        slot_K, num_slots = _frame_slots(layout, survivors, num_entered)
    score_K = None
    if survivors.score_K is not None:
        separator = survivors.score_K.new_full((1,), float("inf"))
        score_K = layout.apply(_grid(survivors, survivors.score_K[:, None], num_tiles, side), separator)[index_K, 0]
    feature_OD = layout.apply(_grid(survivors, survivors.feature_KD, num_tiles, side), newline_D)
    place_K3 = place_O3.to(index_K.device)[index_K]
    return EncodedMedium(
        feature_KD=feature_OD if index_K.shape[0] == feature_OD.shape[0] else feature_OD[index_K],
        slot_K=slot_K,
        num_slots=num_slots,
        frame_counts=_frame_counts(layout, survivors.tiles, index_K.shape[0]),
        place_K3=place_K3,
        score_K=score_K,
        num_patches=num_entered * geometry.grid**2 - medium.num_left_out,
        trace=_trace(layout, survivors, index_K, place_K3),
        patch_place_P4=None if survivors.steps is None else medium_place(patch_places(num_entered, geometry.grid)),
        idle_steps=survivors.idle_steps,
    )


def patch_places(num_tiles: int, grid: int) -> Tensor:
    """(tile, row, col) of every patch of one medium as it enters the tower: int64 [P, 3] on the host."""
    return torch.cartesian_prod(torch.arange(num_tiles), torch.arange(grid), torch.arange(grid))


def _grid(survivors: Survivors, value_KD: Tensor, num_tiles: int, side: int) -> Tensor:
    """Full grids: [K, D] -> [F, side, side, D]."""
    if survivors.owner_FRC is None:
        return value_KD.view(num_tiles, side, side, -1)
    return value_KD[survivors.owner_FRC]


def _filled(layout: TileLayout, survivors: Survivors, num_slots: int) -> Tensor:
    """Which of the layout's slots are filled: int64 [K]. Only a restored image leaves some out."""
    if survivors.owner_FRC is None or layout.kind == "video":
        return torch.arange(num_slots, device=survivors.place_K3.device)
    stands_FRC = torch.zeros_like(survivors.owner_FRC, dtype=torch.bool)
    stands_FRC[survivors.place_K3.unbind(1)] = True
    return layout.occupied(stands_FRC).nonzero().squeeze(1)


def _frame_slots(layout: TileLayout, survivors: Survivors, num_frames: int) -> tuple[Tensor, int]:
    """The prompt slots of the frames that still stand, as in the unreduced video, and how many that has."""
    per_frame, device = layout.pooled**2, survivors.place_K3.device
    first_F1 = torch.tensor(survivors.tiles, device=device)[:, None] * per_frame
    slot_K = (first_F1 + torch.arange(per_frame, device=device)).flatten()
    num_slots = num_frames * per_frame + 1
    return torch.cat([slot_K, slot_K.new_tensor([num_slots - 1])]), num_slots


def _frame_counts(layout: TileLayout, tiles: tuple[int, ...], num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Tokens of each frame. The parts of a tiled image are read as one; newlines stand inside it."""
    if layout.kind == "video":
        return (*((frame, layout.pooled**2) for frame in tiles), (-1, 1))
    if layout.kind == "single":
        return ((0, num_tokens - 1), (-1, 1))
    return ((-1, num_tokens),)


def _trace(layout: TileLayout, survivors: Survivors, index_K: Tensor, place_K3: Tensor) -> tuple[TraceStep, ...]:
    if survivors.steps is None:
        return ()
    matrix = layout.matrix()
    if survivors.owner_FRC is not None:
        owner_P = survivors.owner_FRC.flatten().cpu()
        index = torch.stack([torch.arange(owner_P.shape[0]), owner_P])
        size = (owner_P.shape[0], survivors.feature_KD.shape[0])
        restore = torch.sparse_coo_tensor(index, torch.ones(owner_P.shape[0]), size, check_invariants=False)
        matrix = compose(restore.coalesce(), matrix).index_select(0, index_K.cpu()).coalesce()
    return (*survivors.steps, TraceStep("layout", None, matrix, medium_place(place_K3.cpu())))

"""Encodes tiles to visual tokens: the tower once over all tiles of all media, the projector, and each input's layout.

The LLaVA families share it; they differ in tower and geometry. It knows no reducer: the tower's blocks call the
reduction, and the layout behind the tower restores or re-reads the kept tokens.

Shape suffixes: F tiles, R rows, C columns, K kept tokens, D channels, P patches, H height and W width in px.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from illava.errors import RequestError
from illava.families.llava.geometry import AnyresGeometry
from illava.families.llava.packing import KeptTokens, lay_out, patch_coords
from illava.families.side_copies import PixelCopies, SideCopies
from illava.host_copies import constant_on, to_device
from illava.plan import ReductionPlan
from illava.preprocess import Preprocessor, VisualInput
from illava.reduction.grid_representatives import fill_gaps, representatives
from illava.reduction.patch_selection import PatchSelection
from illava.reduction.probe import AttentionProbe
from illava.reduction.segments import Segments, segment_seeds
from illava.reduction.vision import VisionReduction
from illava.visual_tokens import EncodedVisual


class Tower(Protocol):
    """Runs a vision tower over packed tiles: see `illava.families.llava.towers`."""

    has_cls: bool
    num_blocks: int

    def embed(self, pixels_F3HW: Tensor) -> Tensor: ...

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> Tensor: ...


class TileEncoder:
    """Encodes the media of one loaded model."""

    def __init__(
        self, tower: Tower, projector: Callable[[Tensor], Tensor], newline_D: Tensor, preprocessor: Preprocessor
    ) -> None:
        """Borrow a loaded model's modules.

        Args:
            tower: runs the vision tower's blocks.
            projector: maps patch features to LLM width.
            newline_D: the learned newline token.
            preprocessor: of the same model; its geometry and normalisation are used.
        """
        self._tower, self._projector, self._newline_D = tower, projector, newline_D
        self._preprocessor = preprocessor
        self._geometry: AnyresGeometry = preprocessor.geometry
        self.copies: PixelCopies = SideCopies(newline_D.device)

    def prefetch(self, media: Sequence[VisualInput]) -> None:
        """See `Family.prefetch`."""
        self.copies.begin(mm_item.tiles for mm_item in media)

    def num_patches(self, mm_item: VisualInput) -> int:
        """See `Family.num_patches`."""
        return len(mm_item.tiles) * self._geometry.grid**2

    def num_vision_tokens(self, mm_item: VisualInput) -> int:
        """See `Family.num_vision_tokens`."""
        if mm_item.kind == "video":
            return self._geometry.num_video_tokens(len(mm_item.tiles))
        return self._geometry.num_image_tokens(*mm_item.original_size, num_tiles=len(mm_item.tiles))

    def encode(
        self,
        media: Sequence[VisualInput],
        plan: ReductionPlan,
        *,
        trace: bool,
        seeds: Sequence[int] | None = None,
        probe: AttentionProbe | None = None,
    ) -> list[EncodedVisual]:
        """See `Family.encode`; the tower runs once over all tiles of all media."""
        if not media:
            return []
        grid, device = self._geometry.grid, self._newline_D.device
        num_tiles = [len(mm_item.tiles) for mm_item in media]
        coord_P3 = to_device(torch.cat([patch_coords(count, grid) for count in num_tiles]), device)
        patch_selection = PatchSelection.of(media, num_tiles, (grid**2,) * sum(num_tiles), coord_P3)
        reduction = VisionReduction(
            plan,
            patch_selection.lengths,
            patch_selection.coord_K3,
            num_blocks=self._tower.num_blocks,
            has_cls=self._tower.has_cls,
            seeds=segment_seeds(seeds, num_tiles),
            segments=Segments.of(num_tiles, [mm_item.kind == "video" for mm_item in media]),
            probe=probe,
        )
        hidden_TD = patch_selection.select(self._tower.embed(self.pixels(media)), has_cls=self._tower.has_cls)
        feature_KD = self._projector(self._tower.run(hidden_TD, reduction))
        representative_FRC = merged_FRC = None
        assignments = [*patch_selection.steps, *(step.assignment for step in reduction.steps)]
        if plan.layout == "geometric" and assignments:
            representative_P = representatives(assignments, coord_P3.shape[0], device)
            representative_FRC = representative_P.view(-1, grid, grid)
            if not all(assignment.keeps_content for assignment in assignments):
                representative_FRC = fill_gaps(representative_FRC)
        if plan.size_bias:
            merged_FRC = representatives(assignments, coord_P3.shape[0], device).view(-1, grid, grid)
        parts = _apart(feature_KD, reduction, representative_FRC, merged_FRC, num_tiles, trace=trace)
        encoded = [
            lay_out(part, mm_item, self._geometry, self._newline_D) for part, mm_item in zip(parts, media, strict=True)
        ]
        return patch_selection.traced(encoded) if trace else encoded

    def pixels(self, media: Sequence[VisualInput]) -> Tensor:
        """Rescale and normalise all tiles on the device: float32 [F, 3, H, W].

        Raises:
            RequestError: tiles of another size or dtype than this model's.
        """
        side, prep = self._geometry.tile_px, self._preprocessor
        for mm_item in media:
            if mm_item.tiles.dtype != np.uint8 or mm_item.tiles.shape[1:] != (side, side, 3):
                raise RequestError(
                    f"a visual input has tiles {mm_item.tiles.dtype} {list(mm_item.tiles.shape)}, this model takes "
                    f"uint8 [n, {side}, {side}, 3]; was it prepared by another model's preprocessor?"
                )
        device = self._newline_D.device
        copies = [self.copies.take(mm_item.tiles) for mm_item in media]
        tiles_FHW3 = copies[0] if len(copies) == 1 else torch.cat(copies)
        mean_3HW, std_3HW = (constant_on(x, device, torch.float32).view(3, 1, 1) for x in (prep.mean, prep.std))
        # transformers rescales in float64 and normalises in float32: so do we, for equal bits
        pixels_F3HW = tiles_FHW3.permute(0, 3, 1, 2).double().mul_(prep.rescale_factor).float()
        return pixels_F3HW.sub_(mean_3HW).div_(std_3HW).contiguous()


def _tiles(representative_FRC: Tensor, indices: Sequence[int]) -> Tensor:
    """These tiles: a view where they are neighbours, as all are unless frames were merged."""
    first, stop = indices[0], indices[-1] + 1
    if stop - first == len(indices):
        return representative_FRC[first:stop]
    return representative_FRC[constant_on(indices, representative_FRC.device)]


def _apart(
    feature_KD: Tensor,
    reduction: VisionReduction,
    representative_FRC: Tensor | None,
    merged_FRC: Tensor | None,
    num_tiles: Sequence[int],
    *,
    trace: bool,
) -> list[KeptTokens]:
    """Split the packed result by visual input; representatives then count from the input's own first token."""
    segments = reduction.segments
    merged = [None] * len(num_tiles) if merged_FRC is None else merged_FRC.split(list(num_tiles))
    bounds = pairwise(accumulate(segments.of_media(reduction.lengths), initial=0))
    steps = reduction.trace() if trace else [None] * len(segments.videos)
    parts = []
    for mm_index, (bound, own_steps, own_FRC) in enumerate(zip(bounds, steps, merged, strict=True)):
        own = slice(*bound)
        parts.append(
            KeptTokens(
                feature_KD[own],
                None if reduction.score_T is None else reduction.score_T[own],
                reduction.coord_T3[own],
                None
                if representative_FRC is None
                else _tiles(representative_FRC, segments.original_indices_of(mm_index)) - own.start,
                own_steps,
                segments.tiles_of(mm_index),
                tuple(reduction.noop_steps[mm_index]),
                None if own_FRC is None else torch.where(own_FRC >= 0, own_FRC - own.start, -1),
            )
        )
    return parts

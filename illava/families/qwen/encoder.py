"""Encodes pictures of native resolution to vision tokens: the tower once over all media, then each input separately.

The Qwen families share it; they differ in tower. Every temporal patch of every visual input is one segment. Kept groups
of patches keep their true (time, row, col), and leave gaps among the input's placeholders. It knows no reducer: the
tower's blocks call the reduction.

Shape suffixes: F frames, C colours, H height and W width in px, P patches, X values of a patch, K kept groups, D
channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from illava.errors import RequestError
from illava.families.qwen.blocks import NativeTower
from illava.families.qwen.geometry import NativeGeometry, PatchGrid
from illava.families.side_copies import PixelCopies, SideCopies
from illava.host_copies import constant_on, to_device
from illava.plan import ReductionPlan
from illava.preprocess import Preprocessor, VisualInput
from illava.reduction.grid_representatives import merged_counts
from illava.reduction.patch_groups import group_scores
from illava.reduction.patch_selection import PatchSelection
from illava.reduction.probe import AttentionProbe
from illava.reduction.segments import Segments, segment_seeds
from illava.reduction.trace import visual_coords
from illava.reduction.vision import VisionReduction
from illava.requests import TraceStep
from illava.visual_tokens import EncodedVisual


class NativeEncoder:
    """Encodes the media of one loaded model."""

    def __init__(self, tower: NativeTower, preprocessor: Preprocessor, device: torch.device) -> None:
        """Take a tower, and the preprocessor of the same model for its geometry and normalisation."""
        self._tower, self._preprocessor, self._device = tower, preprocessor, device
        self._geometry: NativeGeometry = preprocessor.geometry
        self.copies: PixelCopies = SideCopies(device)

    def prefetch(self, media: Sequence[VisualInput]) -> None:
        """See `Family.prefetch`."""
        self.copies.begin(mm_item.tiles for mm_item in media)

    def grid(self, mm_item: VisualInput) -> PatchGrid:
        """The grid of the visual input's patches.

        Raises:
            RequestError: tiles of another size or dtype than this model's.
        """
        tiles, factor = mm_item.tiles, self._geometry.factor_px
        if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[1] % factor or tiles.shape[2] % factor:
            raise RequestError(
                f"a visual input has tiles {tiles.dtype} {list(tiles.shape)}, this model takes uint8 [n, height, "
                f"width, 3], sides multiples of {factor} px; was it prepared by another model's preprocessor?"
            )
        return self._geometry.grid(mm_item.kind, *tiles.shape[:3])

    def num_patches(self, mm_item: VisualInput) -> int:
        """See `Family.num_patches`."""
        return self.grid(mm_item).num_patches

    def num_vision_tokens(self, mm_item: VisualInput) -> int:
        """See `Family.num_vision_tokens`."""
        return self.grid(mm_item).num_groups

    def encode(
        self,
        media: Sequence[VisualInput],
        plan: ReductionPlan,
        *,
        trace: bool,
        seeds: Sequence[int] | None = None,
        probe: AttentionProbe | None = None,
    ) -> list[EncodedVisual]:
        """See `Family.encode`; the tower runs once over all media."""
        if not media:
            return []
        grids = [self.grid(mm_item) for mm_item in media]
        coord_P3 = to_device(torch.cat([patch_coords(grid) for grid in grids]), self._device)
        lengths = tuple(grid.rows * grid.cols for grid in grids for _ in range(grid.times))
        num_blocks = self._tower.last_scored_block + 1
        roots = segment_seeds(seeds, [grid.times for grid in grids])
        group_side = self._geometry.group_side
        patch_selection = PatchSelection.of(
            media, [grid.times for grid in grids], lengths, coord_P3, group_side=group_side
        )
        reduction = VisionReduction(
            plan,
            patch_selection.lengths,
            patch_selection.coord_K3,
            num_blocks=num_blocks,
            has_cls=self._tower.has_cls,
            group_side=group_side,
            seeds=roots,
            segments=Segments.of([grid.times for grid in grids], [mm_item.kind == "video" for mm_item in media]),
            probe=probe,
        )
        hidden_PD = self._tower.embed(torch.cat([self.patches(mm_item) for mm_item in media]), grids)
        feature_KD, deepstack = self._tower.run(
            patch_selection.select(hidden_PD, has_cls=self._tower.has_cls), reduction
        )
        encoded = self._apart(media, feature_KD, reduction, trace=trace)
        encoded = patch_selection.traced(encoded) if trace else encoded
        if plan.size_bias:
            assignments = [*patch_selection.steps, *(step.assignment for step in reduction.steps)]
            size_K = merged_counts(assignments, len(coord_P3), sum(reduction.lengths), self._device)[:: group_side**2]
            sizes = size_K.split([len(mm_item.placeholder_K) for mm_item in encoded])
            encoded = [replace(mm_item, size_K=own) for mm_item, own in zip(encoded, sizes, strict=True)]
        if not deepstack:
            return encoded
        counts = [len(mm_item.placeholder_K) for mm_item in encoded]
        deep = zip(*(layer_KD.split(counts) for layer_KD in deepstack), strict=True)
        return [replace(mm_item, deepstack=own) for mm_item, own in zip(encoded, deep, strict=True)]

    def patches(self, mm_item: VisualInput) -> Tensor:
        """Rescale and normalise the input's pixels, in the order the tower reads them: float32 [P, X].

        The last frame is repeated until it fills its temporal patch, and so is an image.

        Source: transformers 5.23, models/qwen2_vl/video_processing_qwen2_vl.py:patchify.
        """
        grid, prep, geometry = self.grid(mm_item), self._preprocessor, self._geometry
        tiles_FHWC = self.copies.take(mm_item.tiles)
        mean_C11, std_C11 = (constant_on(x, self._device, torch.float32).view(3, 1, 1) for x in (prep.mean, prep.std))
        # transformers rescales in float64 and normalises in float32: so do we, for equal bits
        pixels_FCHW = tiles_FHWC.permute(0, 3, 1, 2).double().mul_(prep.rescale_factor).float()
        pixels_FCHW = pixels_FCHW.sub_(mean_C11).div_(std_C11)
        depth, side, px = geometry.frames_per_patch, geometry.group_side, geometry.patch_px
        missing = grid.times * depth - len(pixels_FCHW)
        if missing:
            pixels_FCHW = torch.cat([pixels_FCHW, pixels_FCHW[-1:].expand(missing, -1, -1, -1)])
        rows, cols = grid.groups
        blocks = pixels_FCHW.reshape(grid.times, depth, 3, rows, side, px, cols, side, px)
        return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid.num_patches, -1)

    def frame_counts(
        self, mm_item: VisualInput, grid: PatchGrid, counts: Mapping[int, int]
    ) -> tuple[tuple[int, int], ...]:
        """(frame, kept groups) of an input, frame by frame, from those of each temporal patch that is left."""
        return tuple((time, counts.get(time, 0)) for time in range(grid.times))

    def _apart(
        self, media: Sequence[VisualInput], feature_KD: Tensor, reduction: VisionReduction, *, trace: bool
    ) -> list[EncodedVisual]:
        side, grids = self._geometry.group_side, [self.grid(mm_item) for mm_item in media]
        coord_K3 = reduction.coord_T3[:: side**2].clone()
        coord_K3[:, 1:] //= side
        score_K = group_scores(reduction.score_T, side)
        bounds = pairwise(accumulate(reduction.segments.of_media(reduction.lengths), initial=0))
        groups = [slice(begin // side**2, end // side**2) for begin, end in bounds]
        times = self._groups_in_time(reduction, coord_K3, groups)
        steps = reduction.trace() if trace else [None] * len(grids)
        encoded = []
        for index, (mm_item, grid, own, own_steps) in enumerate(zip(media, grids, groups, steps, strict=True)):
            rows, cols = grid.groups
            encoded.append(
                EncodedVisual(
                    feature_KD=feature_KD[own],
                    placeholder_K=(coord_K3[own] * constant_on([rows * cols, cols, 1], self._device)).sum(1),
                    num_placeholders=grid.num_groups,
                    frame_counts=self.frame_counts(mm_item, grid, times[index]),
                    coord_K3=coord_K3[own],
                    score_K=None if score_K is None else score_K[own],
                    num_patches=grid.num_patches - mm_item.num_left_out * side**2,
                    num_patches_kept=(own.stop - own.start) * side**2,
                    trace=() if own_steps is None else (*own_steps, _merger_step(coord_K3[own].cpu(), side**2)),
                    patch_coord_P4=None if own_steps is None else visual_coords(patch_coords(grid)),
                    noop_steps=tuple(reduction.noop_steps[index]),
                )
            )
        return encoded

    def _groups_in_time(
        self, reduction: VisionReduction, coord_K3: Tensor, groups: Sequence[slice]
    ) -> list[Mapping[int, int]]:
        """The kept groups of each temporal patch, for each input; waits for the device where frames were joined."""
        segments = reduction.segments
        if segments.are_windows:
            time_K = coord_K3[:, 0].cpu()
            return [Counter(time_K[own].tolist()) for own in groups]
        counts: list[dict[int, int]] = [{} for _ in groups]
        for mm_index, (tile,), length in zip(segments.mm_index, segments.tiles, reduction.lengths, strict=True):
            counts[mm_index][tile] = length // self._geometry.group_side**2
        return list(counts)


def patch_coords(grid: PatchGrid) -> Tensor:
    """(time, row, col) of every patch of one input as it enters the tower: group by group, int64 [P, 3], host."""
    rows, cols = grid.groups
    axes = (torch.arange(n) for n in (grid.times, rows, cols, grid.side, grid.side))
    time, row, col, inner_row, inner_col = torch.cartesian_prod(*axes).unbind(1)
    return torch.stack([time, row * grid.side + inner_row, col * grid.side + inner_col], 1)


def _merger_step(coord_K3: Tensor, group_size: int) -> TraceStep:
    """Make the merger's trace step: every vision token is made of the patches of its group, in equal parts."""
    num_tokens = coord_K3.shape[0]
    index = torch.stack([torch.arange(num_tokens).repeat_interleave(group_size), torch.arange(num_tokens * group_size)])
    weight, size = torch.full((index.shape[1],), 1 / group_size), (num_tokens, num_tokens * group_size)
    matrix = torch.sparse_coo_tensor(index, weight, size, check_invariants=False)
    return TraceStep("layout", None, matrix.coalesce(), visual_coords(coord_K3))

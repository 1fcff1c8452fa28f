"""Encodes tiles to vision tokens: the tower once over all tiles of all media, every tile a segment of its own.

What the native-resolution encoder does with temporal patches is done with tiles: whole groups are kept, keep their
(tile, row, col), and leave gaps among the input's placeholders. No newlines, no unpadding.

Shape suffixes: F tiles, H height and W width in px.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from illava.errors import RequestError
from illava.families.qwen.encoder import NativeEncoder
from illava.families.qwen.geometry import PatchGrid
from illava.host_copies import constant_on
from illava.preprocess import VisualInput


class TileGroupEncoder(NativeEncoder):
    """Encodes the media of one loaded model."""

    def grid(self, mm_item: VisualInput) -> PatchGrid:
        """See `NativeEncoder.grid`.

        Raises:
            RequestError: tiles of another size or dtype than this model's.
        """
        tiles, side = mm_item.tiles, self._preprocessor.geometry.tile_px
        if tiles.dtype != np.uint8 or tiles.shape[1:] != (side, side, 3):
            raise RequestError(
                f"a visual input has tiles {tiles.dtype} {list(tiles.shape)}, this model takes uint8 [n, {side}, "
                f"{side}, 3]; was it prepared by another model's preprocessor?"
            )
        return self._geometry.grid(mm_item.kind, *tiles.shape[:3])

    def patches(self, mm_item: VisualInput) -> Tensor:
        """Rescale and normalise the input's pixels; the tower cuts them itself: float32 [F, 3, H, W]."""
        prep = self._preprocessor
        tiles_FHW3 = self.copies.take(mm_item.tiles)
        mean_3HW, std_3HW = (constant_on(x, self._device, torch.float32).view(3, 1, 1) for x in (prep.mean, prep.std))
        # transformers rescales in float64 and normalises in float32: so do we, for equal bits
        pixels_F3HW = tiles_FHW3.permute(0, 3, 1, 2).double().mul_(prep.rescale_factor).float()
        return pixels_F3HW.sub_(mean_3HW).div_(std_3HW).contiguous()

    def frame_counts(
        self, mm_item: VisualInput, grid: PatchGrid, counts: Mapping[int, int]
    ) -> tuple[tuple[int, int], ...]:
        """See `NativeEncoder.frame_counts`: the tiles of one image are no frames."""
        if mm_item.kind == "image" and grid.times > 1:
            return ((-1, sum(counts.values())),)
        return super().frame_counts(mm_item, grid, counts)

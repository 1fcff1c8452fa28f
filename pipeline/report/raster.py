"""Draws cells or attention over a request's pictures, as RGB arrays and PNG bytes.

A cell of one patch shows the patch; patches that became one token share a colour and have an outline where the group
ends; patches that are gone are dark. Places and representatives come from outside.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.report.token_maps import GONE

_MAX_SIDE_PX = 288
_GONE_SHADE, _TINT = 0.18, 0.62
_GAP_PX = 4


@dataclass(frozen=True, slots=True)
class Sheet:
    """Holds one tile or frame of a request, and says which patches lie on it.

    Attributes:
        pixels_HW3: uint8 RGB.
        patch_RC: int64, the patch of the request that covers each cell.
    """

    pixels_HW3: np.ndarray
    patch_RC: np.ndarray


def sheets_of(patch_coord_P4: np.ndarray, media_tiles: Sequence[np.ndarray]) -> list[Sheet]:
    """Make a sheet of every tile or frame that patches stand on, in order of the media.

    A temporal patch of several frames is shown on its first one.

    Args:
        patch_coord_P4: int64 (medium, tile, row, col).
        media_tiles: uint8 [n, H, W, 3] of each medium at model size.

    Raises:
        ValueError: the patches of a tile are not a full grid.
    """
    sheets = []
    for visual, tiles in enumerate(media_tiles):
        own_P = np.flatnonzero(patch_coord_P4[:, 0] == visual)
        num_times = int(patch_coord_P4[own_P, 1].max()) + 1
        frames_each = -(-len(tiles) // num_times)
        for time in range(num_times):
            here_P = own_P[patch_coord_P4[own_P, 1] == time]
            row_P, col_P = patch_coord_P4[here_P, 2], patch_coord_P4[here_P, 3]
            patch_RC = np.full((row_P.max() + 1, col_P.max() + 1), GONE, dtype=np.int64)
            patch_RC[row_P, col_P] = here_P
            if (patch_RC == GONE).any() or patch_RC.size != here_P.size:
                raise ValueError(f"medium {visual}, tile {time}: {here_P.size} patches are no full grid")
            sheets.append(Sheet(tiles[time * frames_each], patch_RC))
    return sheets


def draw_cells(sheet: Sheet, representative_P: np.ndarray) -> np.ndarray:
    """Draw the sheet with its cells as their representatives group them: uint8 [H, W, 3].

    A group that spans several tiles or frames has the same colour on each.
    """
    representative_RC = representative_P[sheet.patch_RC]
    size = np.bincount(representative_P[representative_P != GONE], minlength=1)
    merged_RC = (representative_RC != GONE) & (size[np.maximum(representative_RC, 0)] > 1)
    image, cell_HW = _enlarged(sheet)
    representative_HW, merged_HW = _per_pixel(representative_RC, cell_HW), _per_pixel(merged_RC, cell_HW)
    image[representative_HW == GONE] *= _GONE_SHADE
    colour_HW3 = _colours(representative_HW[merged_HW])
    image[merged_HW] = image[merged_HW] * (1 - _TINT) + colour_HW3 * _TINT
    edge_HW = np.zeros(representative_HW.shape, dtype=bool)
    edge_HW[1:] |= representative_HW[1:] != representative_HW[:-1]
    edge_HW[:, 1:] |= representative_HW[:, 1:] != representative_HW[:, :-1]
    image[edge_HW] = 24
    return image.round().astype(np.uint8)


def draw_heat(sheet: Sheet, value_P: np.ndarray, top: float) -> np.ndarray:
    """Draw the sheet in grey under a map from blue (0) to red (``top`` and more): uint8 [H, W, 3]; NaN is dark."""
    image, cell_HW = _enlarged(sheet)
    value_HW = _per_pixel(value_P[sheet.patch_RC], cell_HW)
    share_HW = np.clip(np.nan_to_num(value_HW) / (top or 1.0), 0, 1)[..., None]
    grey_HW3 = image.mean(-1, keepdims=True)
    heat_HW3 = np.concatenate([255 * share_HW, 96 * (1 - np.abs(2 * share_HW - 1)), 255 * (1 - share_HW)], -1)
    drawn = grey_HW3 * (1 - _TINT) + heat_HW3 * _TINT
    drawn[np.isnan(value_HW)] = (image * _GONE_SHADE)[np.isnan(value_HW)]
    return drawn.round().astype(np.uint8)


def side_by_side(images: Sequence[np.ndarray], per_row: int = 8) -> np.ndarray:
    """Put pictures on one white canvas, row by row."""
    height, width = (max(image.shape[axis] for image in images) + _GAP_PX for axis in (0, 1))
    rows, cols = -(-len(images) // per_row), min(len(images), per_row)
    canvas = np.full((rows * height, cols * width, 3), 255, dtype=np.uint8)
    for n, image in enumerate(images):
        top, left = n // per_row * height, n % per_row * width
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def png(image_HW3: np.ndarray) -> bytes:
    """Encode an RGB picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _enlarged(sheet: Sheet) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The sheet's pixels as floats at a size fit to look at, and the cell row and column of each pixel row and column.

    What a tower's patches do not cover (the rest of 384 px in patches of 14) is cut off.
    """
    rows, cols = sheet.patch_RC.shape
    patch_px = sheet.pixels_HW3.shape[0] // rows, sheet.pixels_HW3.shape[1] // cols
    covered = sheet.pixels_HW3[: rows * patch_px[0], : cols * patch_px[1]]
    longest = max(covered.shape[:2])
    scale = max(1, _MAX_SIDE_PX // longest)
    step = max(1, longest // _MAX_SIDE_PX)
    image = covered.repeat(scale, 0).repeat(scale, 1)[::step, ::step].astype(np.float64)
    row_H = np.arange(covered.shape[0]).repeat(scale)[::step] // patch_px[0]
    col_W = np.arange(covered.shape[1]).repeat(scale)[::step] // patch_px[1]
    return image, (row_H, col_W)


def _per_pixel(value_RC: np.ndarray, cell_HW: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return value_RC[cell_HW[0]][:, cell_HW[1]]


def _colours(representative_N: np.ndarray) -> np.ndarray:
    """A colour for each token, far from its neighbours': hues a golden angle apart, [N, 3] of 0 to 255."""
    hue_N = (representative_N * 0.61803398875) % 1.0
    offset_3 = np.array([0.0, 2 / 3, 1 / 3])
    return 255 * np.clip(np.abs(((hue_N[:, None] + offset_3) % 1.0) * 6 - 3) - 1, 0.08, 1.0)

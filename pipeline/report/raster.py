"""Draws cells or attention over a request's pictures, as RGB arrays and PNG bytes.

Merged groups are drawn as ToMe's authors draw them: in the mean colour of their patches, with a thin outline. A cell of
one patch shows the patch; a token that stands for most of a tile or frame is hatched, as its background; patches that
are gone are dark. Places and representatives come from outside.

Source: arXiv 2210.09461, figure 4; facebookresearch/ToMe@207459a:tome/vis.py, written from what it
shows. Deviations: the outline is neutral instead of coloured at random; a patch alone keeps its pixels; we hatch.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.report.token_maps import GONE

_MAX_SIDE_PX = 288
_GONE_SHADE, _OUTLINE, _HATCH = 0.18, 0.5, 0.28  # the last two: how far towards black or white
_HATCH_PX, _HATCH_LINE_PX = 12, 2
_MOST = 0.5  # of a sheet's cells, beyond which their token is its background
_DIM, _HEAT = 0.62, np.array([255.0, 72.0, 24.0])
_GAP_PX = 4


@dataclass(frozen=True, slots=True)
class Sheet:
    """Holds one tile or frame of a request, and says which patches lie on it.

    Attributes:
        pixels_HW3: uint8 RGB.
        patch_RC: int64, the patch of the request that covers each cell.
        number: of the tile or frame, from 1; behind the medium's where there are several.
    """

    pixels_HW3: np.ndarray
    patch_RC: np.ndarray
    number: str = ""


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
            number = f"{visual + 1}.{time + 1}" if len(media_tiles) > 1 else f"{time + 1}"
            sheets.append(Sheet(tiles[time * frames_each], patch_RC, number))
    return sheets


def draw_cells(sheets: Sequence[Sheet], representative_P: np.ndarray) -> list[np.ndarray]:
    """Draw each sheet with its cells as their representatives group them: uint8 [H, W, 3].

    Args:
        sheets: all of a request; a group that spans several has one colour, the mean over all of its patches.
        representative_P: the token each patch belongs to, or `GONE`.
    """
    size_K, colour_K3 = _groups(sheets, representative_P)
    background_K = np.zeros(len(size_K), dtype=bool)
    for representative_RC in (representative_P[sheet.patch_RC] for sheet in sheets):
        here_K = np.bincount(representative_RC[representative_RC != GONE], minlength=len(size_K))
        background_K |= here_K > max(_MOST * representative_RC.size, 1)
    return [_draw_sheet(sheet, representative_P, size_K, colour_K3, background_K) for sheet in sheets]


def draw_heat(sheet: Sheet, value_P: np.ndarray, top: float) -> np.ndarray:
    """Draw the sheet in dim grey, the redder the more, from 0 to ``top``: uint8 [H, W, 3]; NaN is dark."""
    image, cell_HW = _enlarged(sheet)
    value_HW = _per_pixel(value_P[sheet.patch_RC], cell_HW)
    share_HW1 = np.clip(np.nan_to_num(value_HW) / (top or 1.0), 0, 1)[..., None]
    grey_HW3 = np.broadcast_to(image.mean(-1, keepdims=True) * _DIM, image.shape)
    drawn = grey_HW3 * (1 - 0.85 * share_HW1) + _HEAT * 0.85 * share_HW1
    drawn[np.isnan(value_HW)] = (image * _GONE_SHADE)[np.isnan(value_HW)]
    return drawn.round().astype(np.uint8)


def shrink(image_HW3: np.ndarray, most_px: int, *, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Shrink a picture to a longest side, into the aspect of a ``shape`` (height, width); a smaller one is left."""
    height, width = shape or image_HW3.shape[:2]
    scale = min(1.0, most_px / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size == image_HW3.shape[1::-1]:
        return image_HW3
    return np.asarray(Image.fromarray(image_HW3).resize(size, Image.Resampling.BOX))


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
    patch_px = _patch_px(sheet)
    covered = sheet.pixels_HW3[: rows * patch_px[0], : cols * patch_px[1]]
    longest = max(covered.shape[:2])
    scale = max(1, _MAX_SIDE_PX // longest)
    step = max(1, longest // _MAX_SIDE_PX)
    image = covered.repeat(scale, 0).repeat(scale, 1)[::step, ::step].astype(np.float64)
    row_H = np.arange(covered.shape[0]).repeat(scale)[::step] // patch_px[0]
    col_W = np.arange(covered.shape[1]).repeat(scale)[::step] // patch_px[1]
    return image, (row_H, col_W)


def _patch_px(sheet: Sheet) -> tuple[int, int]:
    return sheet.pixels_HW3.shape[0] // sheet.patch_RC.shape[0], sheet.pixels_HW3.shape[1] // sheet.patch_RC.shape[1]


def _per_pixel(value_RC: np.ndarray, cell_HW: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return value_RC[cell_HW[0]][:, cell_HW[1]]


def _groups(sheets: Sequence[Sheet], representative_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many patches each token stands for, and their mean colour."""
    num_tokens = int(representative_P.max(initial=GONE)) + 1
    size_K, sum_K3 = np.zeros(num_tokens, dtype=np.int64), np.zeros((num_tokens, 3))
    for sheet in sheets:
        rows, cols = sheet.patch_RC.shape
        high, wide = _patch_px(sheet)
        covered = sheet.pixels_HW3[: rows * high, : cols * wide].reshape(rows, high, cols, wide, 3)
        representative_N, colour_N3 = representative_P[sheet.patch_RC].ravel(), covered.mean((1, 3)).reshape(-1, 3)
        there_N = representative_N != GONE
        np.add.at(size_K, representative_N[there_N], 1)
        np.add.at(sum_K3, representative_N[there_N], colour_N3[there_N])
    return size_K, sum_K3 / np.maximum(size_K, 1)[:, None]


def _draw_sheet(
    sheet: Sheet, representative_P: np.ndarray, size_K: np.ndarray, colour_K3: np.ndarray, background_K: np.ndarray
) -> np.ndarray:
    image, cell_HW = _enlarged(sheet)
    representative_HW = _per_pixel(representative_P[sheet.patch_RC], cell_HW)
    image[representative_HW == GONE] *= _GONE_SHADE
    # `GONE` is the last place of what follows: it is neither merged nor a background.
    merged_HW, background_HW = (np.append(own_K, False)[representative_HW] for own_K in (size_K > 1, background_K))
    image[merged_HW] = colour_K3[representative_HW[merged_HW]]
    row_H1, col_W = np.arange(image.shape[0])[:, None], np.arange(image.shape[1])
    _contrast(image, background_HW & ((row_H1 + col_W) % _HATCH_PX < _HATCH_LINE_PX), _HATCH)
    edge_HW = np.zeros(representative_HW.shape, dtype=bool)
    below, right = (slice(1, None), slice(None)), (slice(None), slice(1, None))
    above, left = (slice(None, -1), slice(None)), (slice(None), slice(None, -1))
    for here, before in ((below, above), (right, left)):
        differs = representative_HW[here] != representative_HW[before]
        edge_HW[here] |= differs & (merged_HW[here] | merged_HW[before])
    _contrast(image, edge_HW, _OUTLINE)
    return image.round().astype(np.uint8)


def _contrast(image_HW3: np.ndarray, where_HW: np.ndarray, share: float) -> None:
    """Move pixels towards black, or towards white where they are dark."""
    found_N3 = image_HW3[where_HW]
    towards_N1 = np.where(found_N3.mean(-1, keepdims=True) < 110, 255.0, 0.0)
    image_HW3[where_HW] = found_N3 * (1 - share) + towards_N1 * share

"""Does InternVL's arithmetic of tiles: how many an image is cut into, and the grid of patches of each.

Integers only: no pixels, no tensors, no torch, so readers and dry runs may use it.

Source: transformers 5.23, models/got_ocr2/image_processing_pil_got_ocr2.py:get_optimal_tiled_canvas, which InternVL's
processor calls with ``crop_to_patches``. Copied in behaviour and tested equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from illava.errors import ModelLoadError
from illava.families.qwen.geometry import PatchGrid
from illava.model_files import ModelFiles
from illava.pixel_limits import PixelLimits

# Defaults of transformers' InternVLVisionConfig and GotOcr2ImageProcessor.
_TILE_PX, _PATCH_PX, _LEAST_TILES, _MOST_TILES = 448, 14, 1, 12


@dataclass(frozen=True, slots=True)
class TileGroupGeometry:
    """Computes tiles and grids of one model.

    Attributes:
        tile_px: side of a tile, which is the tower's input.
        patch_px: side of a patch.
        group_side: patches per side of a group, which the projector joins into one vision token.
        min_tiles, max_tiles: of an image, thumbnail apart.
    """

    tile_px: int
    patch_px: int
    group_side: int
    min_tiles: int
    max_tiles: int
    reads_videos: bool = True

    @property
    def factor_px(self) -> int:
        """Side of a group."""
        return self.patch_px * self.group_side

    @property
    def patches_per_tile(self) -> int:
        return (self.tile_px // self.patch_px) ** 2

    @property
    def groups_per_tile(self) -> int:
        return self.patches_per_tile // self.group_side**2

    @property
    def most_tiles(self) -> int:
        """Tiles an image can become at most, its thumbnail included."""
        return self.max_tiles + 1 if self.max_tiles > 1 else 1

    def within(self, limits: PixelLimits) -> TileGroupGeometry:
        """The same model with at most ``max_tiles`` tiles an image, as with another ``max_patches`` of its processor.

        Raises:
            ModelLoadError: fewer than the processor's ``min_patches``.
        """
        if limits.max_tiles is None:
            return self
        if limits.max_tiles < self.min_tiles:
            raise ModelLoadError(
                f"max_tiles is {limits.max_tiles}, and this model cuts an image into {self.min_tiles} tiles at least, "
                f"thumbnail apart; set {self.min_tiles} or more"
            )
        return replace(self, max_tiles=limits.max_tiles)

    def tile_grid(self, height: int, width: int, *, max_tiles: int | None = None) -> tuple[int, int]:
        """(rows, cols) of tiles whose aspect ratio is nearest to the picture's.

        Among equals more tiles are taken, until they cover twice the picture's area.
        """
        most = self.max_tiles if max_tiles is None else max_tiles
        least, area, best, best_gap = min(self.min_tiles, most), height * width, (1, 1), float("inf")
        grids = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most]
        for cols, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            gap = abs(width / height - cols / rows)
            if gap < best_gap:
                best, best_gap = (rows, cols), gap
            elif gap == best_gap and area > 0.5 * self.tile_px**2 * cols * rows:
                best = (rows, cols)
        return best

    def num_tiles(self, kind: Literal["image", "video"], num_frames: int, height: int, width: int) -> int:
        """Tiles of a visual input before any resize; an image of several tiles has its thumbnail behind them."""
        if kind == "video":
            return num_frames
        rows, cols = self.tile_grid(height, width)
        return rows * cols + (rows * cols > 1)

    def grid(self, kind: Literal["image", "video"], num_tiles: int, height: int, width: int) -> PatchGrid:
        """The grid of a visual input of ``num_tiles`` tiles or frames of model size: each is a time of its own."""
        return PatchGrid(num_tiles, height // self.patch_px, width // self.patch_px, self.group_side)

    def grid_of(self, kind: Literal["image", "video"], num_frames: int, height: int, width: int) -> PatchGrid:
        """The grid of a visual input of ``num_frames`` frames before any resize."""
        return self.grid(kind, self.num_tiles(kind, num_frames, height, width), self.tile_px, self.tile_px)


def internvl_geometry(files: ModelFiles) -> TileGroupGeometry:
    """Read tiles and groups from the files of an InternVL.

    Raises:
        ModelLoadError: tiles or patches that are no squares, or that do not make whole groups.
    """
    vision, image = files.config.section("vision_config"), files.image_processor
    tile_px = _side(vision.get("image_size", _TILE_PX), "image_size", vision.where)
    patch_px = _side(vision.get("patch_size", _PATCH_PX), "patch_size", vision.where)
    ratio = files.config.get("downsample_ratio", 0.5)
    side = round(1 / ratio) if ratio else 0
    if side < 1 or side * ratio != 1 or tile_px % (patch_px * side):
        raise ModelLoadError(
            f"{files.config.where}: downsample_ratio {ratio} does not join a tile of {tile_px} px and patches of "
            f"{patch_px} px into whole groups"
        )
    least, most = image.get("min_patches", _LEAST_TILES), image.get("max_patches", _MOST_TILES)
    if not 1 <= least <= most:
        raise ModelLoadError(f"{image.where} has min_patches {least} and max_patches {most}; expected 1 <= min <= max")
    return TileGroupGeometry(tile_px, patch_px, side, least, most)


def model_depth(files: ModelFiles) -> tuple[int, int]:
    """Read the blocks of the tower, and the layers of the LLM."""
    vision, text = files.config.section("vision_config"), files.config.section("text_config")
    return vision["num_hidden_layers"], text["num_hidden_layers"]


def _side(given: Any, key: str, where: str) -> int:
    sides = {given} if isinstance(given, int) else set(given)
    if len(sides) != 1:
        raise ModelLoadError(f"{where} has {key} {given}; only squares are supported")
    return int(sides.pop())

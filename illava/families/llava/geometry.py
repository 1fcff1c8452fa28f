"""Does the anyres arithmetic of the LLaVA families: the tiles of an image, and the layout of their tokens.

Integers only: no pixels, no tensors, no torch, so readers and dry runs may use it. The same functions lay out a reduced
pseudo-grid, with its own ``side``.

Source: transformers 5.23, models/llava_onevision/{modeling,processing}_llava_onevision.py, the same of llava_next, and
image_processing_utils.py. Copied in behaviour, down to the rounding, and tested equal.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from illava.errors import ModelLoadError
from illava.model_files import ModelFiles
from illava.pixel_limits import PixelLimits

# Source: transformers 5.23, LlamaConfig and MistralConfig.
_DEFAULT_NUM_LAYERS = {"llama": 32, "mistral": 32}


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """Says how the tiles of one image (base tile apart) become rows of tokens, in cells.

    Attributes:
        rows, cols: of the joined grid of all tiles.
        top, bottom, left, right: the part of it without padding: rows ``top:bottom``, cols ``left:right``.
        resized: (rows, cols) that the unpadded grid is interpolated to where it is over the budget, else None.
    """

    rows: int
    cols: int
    top: int
    bottom: int
    left: int
    right: int
    resized: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the grid the LLM reads, newlines apart."""
        return self.resized or (self.bottom - self.top, self.right - self.left)

    @property
    def num_tokens(self) -> int:
        """Tokens of that grid with one newline per row."""
        rows, cols = self.shape
        return rows * (cols + 1)


@dataclass(frozen=True, slots=True)
class AnyresGeometry:
    """Computes tiles and token grids of one model.

    Attributes:
        tile_px: side of a tile, which is the tower's input.
        patch_px: side of a patch.
        pinpoints: (height, width) px of every canvas an image may be fitted to.
        max_tiles: budget of ``anyres_max_N``; a larger unpadded grid is interpolated down. None: no budget.
        tiles_every_image: each of several images is tiled like a single one; else it is its base tile alone.
        reads_videos: frames of videos are read, each pooled by two.
    """

    tile_px: int
    patch_px: int
    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int | None
    tiles_every_image: bool = False
    reads_videos: bool = True

    @property
    def grid(self) -> int:
        """Patches per side of a tile."""
        return self.tile_px // self.patch_px

    @property
    def patches_per_tile(self) -> int:
        return self.grid**2

    @property
    def pooled(self) -> int:
        """Tokens per side of a pooled video frame."""
        return math.ceil(self.grid / 2)

    @property
    def most_tiles(self) -> int:
        """Tiles an image can become at most, its base tile included."""
        return 1 + max(self.num_canvas_tiles(*canvas) for canvas in self.pinpoints)

    def num_canvas_tiles(self, height: int, width: int) -> int:
        """Tiles of a canvas of so many px, base tile apart."""
        return (height // self.tile_px) * (width // self.tile_px)

    def within(self, limits: PixelLimits) -> AnyresGeometry:
        """The same model with the canvases of at most ``max_tiles`` tiles, as with a shorter `image_grid_pinpoints`.

        Raises:
            ModelLoadError: there is no such canvas.
        """
        if limits.max_tiles is None:
            return self
        left = tuple(size for size in self.pinpoints if self.num_canvas_tiles(*size) <= limits.max_tiles)
        if not left:
            fewest = min(self.num_canvas_tiles(*size) for size in self.pinpoints)
            raise ModelLoadError(
                f"max_tiles is {limits.max_tiles}, and this model cuts an image into {fewest} tiles at least, base "
                f"tile apart; set {fewest} or more"
            )
        return replace(self, pinpoints=left)

    def best_resolution(self, height: int, width: int) -> tuple[int, int]:
        """The canvas (height, width) px that keeps most of the picture and, among equals, wastes least.

        Args:
            height: of the original image, px.
            width: of the original image, px.

        Source: transformers image_processing_utils.py:select_best_resolution.
        """
        best = self.pinpoints[0]
        most_kept, least_wasted = 0, math.inf
        for canvas_height, canvas_width in self.pinpoints:
            scale = min(canvas_width / width, canvas_height / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            wasted = canvas_width * canvas_height - kept
            if kept > most_kept or (kept == most_kept and wasted < least_wasted):
                best, most_kept, least_wasted = (canvas_height, canvas_width), kept, wasted
        return best

    def tile_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, cols) of tiles an image is cut into, base tile apart.

        Source: modeling_llava_onevision.py:get_anyres_image_grid_shape.
        """
        canvas_height, canvas_width = self.best_resolution(height, width)
        return canvas_height // self.tile_px, canvas_width // self.tile_px

    def image_layout(self, height: int, width: int, *, side: int | None = None) -> ImageLayout:
        """Join, unpad and, over the budget, resize the tiles of an image of ``height`` x ``width`` px.

        Args:
            side: cells per side of a tile; the patch grid unless given (a released pseudo-grid has fewer).

        Source: modeling_llava_onevision.py:unpad_image, :LlavaOnevisionModel.pack_image_features.
        """
        side = side or self.grid
        tile_rows, tile_cols = self.tile_grid(height, width)
        rows, cols = tile_rows * side, tile_cols * side
        top = left = 0
        if width / height > cols / rows:
            top = (rows - int(round(height * (cols / width), 7))) // 2
        else:
            left = (cols - int(round(width * (rows / height), 7))) // 2
        bottom, right = rows - top, cols - left
        return ImageLayout(
            rows, cols, top, bottom, left, right, resized=self._over_budget(bottom - top, right - left, side)
        )

    def _over_budget(self, rows: int, cols: int, side: int) -> tuple[int, int] | None:
        if self.max_tiles is None:
            return None
        ratio = math.sqrt(rows * cols / (self.max_tiles * side**2))
        return (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else None

    def num_image_tokens(self, height: int, width: int, *, num_tiles: int, side: int | None = None) -> int:
        """Visual tokens of an image, newlines included.

        Args:
            num_tiles: tiles it was cut into, base tile included. 1 is an image among several: base and one newline.
            side: as in `image_layout`.

        Source: processing_llava_onevision.py:_get_number_of_features, :replace_image_token.
        """
        base = (side or self.grid) ** 2
        if num_tiles == 1:
            return base + 1
        return base + self.image_layout(height, width, side=side).num_tokens

    def num_video_tokens(self, num_frames: int, *, side: int | None = None) -> int:
        """Visual tokens of a video: every frame pooled by two, one newline at the end.

        Source: processing_llava_onevision.py:replace_video_token.
        """
        return num_frames * math.ceil((side or self.grid) / 2) ** 2 + 1


def onevision_geometry(files: ModelFiles) -> AnyresGeometry:
    """Read the geometry of a LLaVA-OneVision from its config.json.

    Raises:
        ModelLoadError: a key is missing, a canvas is no multiple of the tile, or the aspect ratio rule is unknown.
    """
    rule = files.config["vision_aspect_ratio"]
    budget = re.fullmatch(r"anyres(?:_max_(\d+))?", rule)
    if budget is None:
        raise ModelLoadError(f"{files.config.where}: vision_aspect_ratio is {rule!r}; expected anyres or anyres_max_N")
    max_tiles = int(budget[1]) if budget[1] else None
    return AnyresGeometry(*_tiles_and_canvases(files), max_tiles=max_tiles)


def next_geometry(files: ModelFiles) -> AnyresGeometry:
    """Read the geometry of a LLaVA-NeXT, which tiles every image, has no tile budget and reads no video.

    Raises:
        ModelLoadError: a key is missing, or a canvas is no multiple of the tile.
    """
    return AnyresGeometry(*_tiles_and_canvases(files), max_tiles=None, tiles_every_image=True, reads_videos=False)


def model_depth(files: ModelFiles) -> tuple[int, int]:
    """Read the blocks of the tower up to the feature that is used, and the layers of the LLM.

    Raises:
        ModelLoadError: a key is missing, or several features are concatenated.
    """
    feature = files.config["vision_feature_layer"]
    num_blocks = files.config.section("vision_config")["num_hidden_layers"]
    if not isinstance(feature, int):
        raise ModelLoadError(f"{files.config.where}: vision_feature_layer is {feature!r}; expected one layer")
    text = files.config.section("text_config")
    default = _DEFAULT_NUM_LAYERS.get(text.get("model_type"))  # published LLaVA-NeXT 7B configurations say no number
    num_layers = text["num_hidden_layers"] if default is None else text.get("num_hidden_layers", default)
    return num_blocks + 1 + feature if feature < 0 else feature, num_layers


def _tiles_and_canvases(files: ModelFiles) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Sides of a tile and of a patch in px, and the canvases."""
    vision = files.config.section("vision_config")
    tile_px, patch_px = vision["image_size"], vision["patch_size"]
    if not files.config["image_grid_pinpoints"]:
        raise ModelLoadError(f"{files.config.where}: image_grid_pinpoints is empty; images need one canvas at least")
    pinpoints = tuple((height, width) for height, width in files.config["image_grid_pinpoints"])
    for height, width in pinpoints:
        if height % tile_px or width % tile_px:
            raise ModelLoadError(
                f"{files.config.where}: canvas {height}x{width} in image_grid_pinpoints is no multiple of the "
                f"{tile_px} px tile"
            )
    return tile_px, patch_px, pinpoints

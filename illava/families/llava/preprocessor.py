"""Cuts frames into square tiles for the LLaVA families: uint8 in, uint8 out.

It runs in the readers, so it imports neither torch nor transformers.

Source: transformers 5.23, models/llava_onevision/image_processing_pil_llava_onevision.py and
models/llava_next/image_processing_pil_llava_next.py, tested equal to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from illava.errors import ModelLoadError, PreprocessError
from illava.families.llava.geometry import AnyresGeometry
from illava.model_files import JsonSection, ModelFiles
from illava.preprocess import Preprocessor, VisualCells, VisualInput, check_images, resize, square_video

# The square of an image set's member is held in memory once: 805 MB at this side.
MAX_SQUARE_PX = 16_384


class TilePreprocessor(Preprocessor):
    """Cuts images into square tiles, and makes one tile of each video frame."""

    __slots__ = ()
    geometry: AnyresGeometry

    def images(self, frames: Sequence[np.ndarray]) -> tuple[VisualInput, ...]:
        """Prepare the images of one request, in order. A single image is tiled; each of several is tiled or padded.

        Args:
            frames: uint8 [H, W, 3] RGB each, of any sizes.

        Raises:
            PreprocessError: no image, one of the wrong dtype or shape, or one of several above `MAX_SQUARE_PX`.
        """
        check_images(frames)
        tile = self._anyres if len(frames) == 1 or self.geometry.tiles_every_image else self._padded_square
        return tuple(VisualInput("image", tile(frame), frame.shape[:2]) for frame in frames)

    def video(self, frames: np.ndarray | Sequence[np.ndarray]) -> VisualInput:
        """Resize each frame of a video to the tower's square input.

        Args:
            frames: uint8 [F, H, W, 3] RGB, or F frames of one size.

        Raises:
            PreprocessError: no frames, frames of the wrong dtype or shape, or of different sizes; or this model reads
                images only.
        """
        if self.video_resample is None:
            raise PreprocessError(
                f"{self.model_type} reads images only; give some of the video's frames as images, or take a model that "
                "reads videos, such as LLaVA-OneVision"
            )
        return square_video(frames, self.geometry.tile_px, self.video_resample)

    def cells(self, mm_item: VisualInput) -> VisualCells:
        """See `Preprocessor.cells`: a cell is a patch."""
        side, px = self.geometry.grid, self.geometry.patch_px
        num_tiles = len(mm_item.tiles)
        cut = mm_item.tiles[:, : side * px, : side * px].reshape(num_tiles, side, px, side, px, 3)
        padding = np.zeros((num_tiles, side, side), bool)
        if mm_item.kind == "image" and num_tiles > 1:
            layout = self.geometry.image_layout(*mm_item.original_size)
            is_padding = np.ones((layout.rows, layout.cols), bool)
            is_padding[layout.top : layout.bottom, layout.left : layout.right] = False
            padding[1:] = is_padding.reshape(layout.rows // side, side, -1, side).swapaxes(1, 2).reshape(-1, side, side)
        return VisualCells(
            pixels_TX=cut.swapaxes(2, 3).reshape(num_tiles * side**2, -1),
            coord_T3=np.indices((num_tiles, side, side)).reshape(3, -1).T,
            lengths=(num_tiles * side**2,) if mm_item.kind == "video" else (side**2,) * num_tiles,
            padding_T=padding.reshape(-1),
        )

    def with_frames(self, mm_item: VisualInput, frames: Sequence[int]) -> VisualInput:
        """See `Preprocessor.with_frames`."""
        return mm_item.of_frames(frames)

    def shrink(self, mm_item: VisualInput, ratio: float) -> VisualInput:
        """See `Preprocessor.shrink`: fit the picture to the best canvas of that share of its tiles; keep the base tile.

        The picture is taken from its canvas; the result is what this model makes of a picture of that size.
        """
        most = int(len(mm_item.tiles) * ratio) - 1
        canvases = tuple(size for size in self.geometry.pinpoints if self.geometry.num_canvas_tiles(*size) <= most)
        if mm_item.kind == "video" or len(mm_item.tiles) == 1 or not canvases:
            what = "a video frame" if mm_item.kind == "video" else f"an image in {len(mm_item.tiles)} tiles"
            raise PreprocessError(
                f"{self.model_type} cannot read {what} at {ratio:g} of its patches: its tower takes tiles of one size, "
                "and there are no fewer of them. Raise keep_ratio, or reduce with another method"
            )
        side, size = self.geometry.tile_px, mm_item.original_size
        canvas_height, canvas_width = self.geometry.best_resolution(*size)
        rows, cols = canvas_height // side, canvas_width // side
        canvas = mm_item.tiles[1:].reshape(rows, cols, side, side, 3).swapaxes(1, 2)
        canvas = canvas.reshape(canvas_height, canvas_width, 3)
        height, width = _fit(*size, canvas_height, canvas_width)
        top, left = (canvas_height - height) // 2, (canvas_width - width) // 2
        smaller = replace(self.geometry, pinpoints=canvases)
        small_size = _fit(*size, *smaller.best_resolution(*size))
        small = resize(canvas[top : top + height, left : left + width], *small_size, self.image_resample)
        tiles = self._anyres(small)
        tiles[0] = mm_item.tiles[0]
        return replace(mm_item, tiles=tiles, original_size=small_size)

    def max_nbytes(self, num_frames: int) -> int:
        """Upper bound of the bytes of a loaded item of ``num_frames`` frames or images, for admission control.

        One image may become many tiles, and a count of one does not say whether it is an image.
        """
        tiled = num_frames == 1 or self.geometry.tiles_every_image
        num_tiles = num_frames * (self.geometry.most_tiles if tiled else 1)
        return num_tiles * self.geometry.tile_px**2 * 3

    def _anyres(self, frame: np.ndarray) -> np.ndarray:
        """Make the base tile, then the tiles of the canvas in raster order: [n, side, side, 3]."""
        side = self.geometry.tile_px
        original_height, original_width = frame.shape[:2]
        canvas_height, canvas_width = self.geometry.best_resolution(original_height, original_width)
        height, width = _fit(original_height, original_width, canvas_height, canvas_width)
        top, left = (canvas_height - height) // 2, (canvas_width - width) // 2
        canvas = np.zeros((canvas_height, canvas_width, 3), np.uint8)
        canvas[top : top + height, left : left + width] = resize(frame, height, width, self.image_resample)

        rows, cols = canvas_height // side, canvas_width // side
        tiles = np.empty((1 + rows * cols, side, side, 3), np.uint8)
        tiles[0] = resize(frame, side, side, self.image_resample)
        tiles[1:].reshape(rows, cols, side, side, 3)[:] = canvas.reshape(rows, side, cols, side, 3).swapaxes(1, 2)
        return tiles

    def _padded_square(self, frame: np.ndarray) -> np.ndarray:
        """Put the whole image on a square of mean colour, as one tile: [1, side, side, 3]."""
        height, width = frame.shape[:2]
        longest = max(height, width)
        if longest > MAX_SQUARE_PX:
            raise PreprocessError(
                f"an image of {width}x{height} px among several would be padded to a square of {longest} px; "
                f"at most {MAX_SQUARE_PX} px are taken: scale it down first"
            )
        top, left = (longest - height) // 2, (longest - width) // 2
        square = np.empty((longest, longest, 3), np.uint8)
        square[:] = [int(channel * 255) for channel in self.mean]
        square[top : top + height, left : left + width] = frame
        side = self.geometry.tile_px
        return resize(square, side, side, self.image_resample)[None]


def _fit(height: int, width: int, canvas_height: int, canvas_width: int) -> tuple[int, int]:
    """Largest (height, width) of that aspect ratio on the canvas, rounded up.

    Source: transformers image_processing_utils.py:get_patch_output_size.
    """
    scale_rows, scale_cols = canvas_height / height, canvas_width / width
    if scale_cols < scale_rows:
        return min(math.ceil(height * scale_cols), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * scale_rows), canvas_width)


def onevision_preprocessor(files: ModelFiles, geometry: AnyresGeometry) -> TilePreprocessor:
    """Make the preprocessor that a LLaVA-OneVision's files describe."""
    image, video = files.image_processor, files.video_processor
    tile = {"height": geometry.tile_px, "width": geometry.tile_px}
    for section in (image, video):
        _check_steps(section, {"size": tile}, crops=False)
    for key in ("image_mean", "image_std", "rescale_factor"):
        if image[key] != video[key]:
            raise ModelLoadError(f"{video.where} and {image.where} differ in {key!r}; one model has one normalisation")
    return _build(files, geometry, video_resample=video["resample"])


def next_preprocessor(files: ModelFiles, geometry: AnyresGeometry) -> TilePreprocessor:
    """Make the preprocessor of a LLaVA-NeXT; its resize and crop change nothing, since tiles have the tower's size."""
    tile = {"height": geometry.tile_px, "width": geometry.tile_px}
    sizes = {"size": {"shortest_edge": geometry.tile_px}, "crop_size": tile}
    _check_steps(files.image_processor, sizes, crops=True)
    return _build(files, geometry, video_resample=None)


def _build(files: ModelFiles, geometry: AnyresGeometry, *, video_resample: int | None) -> TilePreprocessor:
    image = files.image_processor
    if [list(pair) for pair in image["image_grid_pinpoints"]] != [
        list(pair) for pair in files.config["image_grid_pinpoints"]
    ]:
        raise ModelLoadError(f"{image.where} and {files.config.where} differ in 'image_grid_pinpoints'")
    return TilePreprocessor(
        model_type=files.model_type,
        geometry=geometry,
        image_resample=image["resample"],
        video_resample=video_resample,
        rescale_factor=image["rescale_factor"],
        mean=tuple(image["image_mean"]),
        std=tuple(image["image_std"]),
    )


def _check_steps(section: JsonSection, sizes: dict[str, dict[str, int]], *, crops: bool) -> None:
    """Refuse a processor configuration whose steps are not resize, rescale, normalise to the tower's square tile."""
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": crops}
    for key, expected in steps.items():
        if bool(section.get(key, expected)) != expected:
            raise ModelLoadError(f"{section.where} sets {key}: {section.get(key)}; only {expected} is supported")
    for key, expected_size in sizes.items():
        given = section[key]
        if {name: given.get(name) for name in expected_size} != expected_size:
            side = max(expected_size.values())
            raise ModelLoadError(f"{section.where} has {key} {given}; the vision tower takes {side}x{side} px")

"""Cuts images into square tiles for InternVL, with a thumbnail behind them, and makes one tile of each video frame.

An image is stretched to the canvas of tiles whose aspect ratio is nearest: nothing is padded. It runs in the readers,
so it imports neither torch nor transformers.

Source: transformers 5.23, models/got_ocr2/image_processing_pil_got_ocr2.py, tested equal to it;
models/internvl/processing_internvl.py sets ``crop_to_patches`` whatever the folder's file says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from illava.errors import ModelLoadError, PreprocessError
from illava.families.internvl.geometry import TileGroupGeometry
from illava.model_files import JsonSection, ModelFiles
from illava.preprocess import Preprocessor, VisualCells, VisualInput, check_images, resize, square_video

_BICUBIC = 3


class TileGroupPreprocessor(Preprocessor):
    """Cuts every image into tiles, and makes one tile of each video frame."""

    __slots__ = ()
    geometry: TileGroupGeometry
    video_resample: int

    def images(self, frames: Sequence[np.ndarray]) -> tuple[VisualInput, ...]:
        """Prepare the images of one request, in order; each is tiled, however many there are.

        Args:
            frames: uint8 [H, W, 3] RGB each, of any sizes.

        Raises:
            PreprocessError: no image, or one of the wrong dtype or shape.
        """
        check_images(frames)
        return tuple(VisualInput("image", self._tiles(frame), frame.shape[:2]) for frame in frames)

    def video(self, frames: np.ndarray | Sequence[np.ndarray]) -> VisualInput:
        """Resize each frame of a video to one tile.

        Args:
            frames: uint8 [F, H, W, 3] RGB, or F frames of one size.

        Raises:
            PreprocessError: no frames, frames of the wrong dtype or shape, or of different sizes.
        """
        return square_video(frames, self.geometry.tile_px, self.video_resample)

    def cells(self, mm_item: VisualInput) -> VisualCells:
        """See `Preprocessor.cells`: a cell is a group of patches."""
        px, num_tiles = self.geometry.factor_px, len(mm_item.tiles)
        side = self.geometry.tile_px // px
        cut = mm_item.tiles.reshape(num_tiles, side, px, side, px, 3).swapaxes(2, 3)
        return VisualCells(
            pixels_TX=cut.reshape(num_tiles * side**2, -1),
            coord_T3=np.indices((num_tiles, side, side)).reshape(3, -1).T,
            lengths=(num_tiles * side**2,) if mm_item.kind == "video" else (side**2,) * num_tiles,
            padding_T=np.zeros(num_tiles * side**2, bool),
        )

    def with_frames(self, mm_item: VisualInput, frames: Sequence[int]) -> VisualInput:
        """See `Preprocessor.with_frames`."""
        return mm_item.of_frames(frames)

    def shrink(self, mm_item: VisualInput, ratio: float) -> VisualInput:
        """See `Preprocessor.shrink`: the picture on fewer tiles, taken from its canvas; the thumbnail stays."""
        num_tiles = len(mm_item.tiles)
        most = int(num_tiles * ratio + 1e-6)
        if mm_item.kind == "video" or num_tiles == 1 or most < 1:
            what = "a video frame" if mm_item.kind == "video" else f"an image in {num_tiles} tiles"
            raise PreprocessError(
                f"{self.model_type} cannot read {what} at {ratio:g} of its patches: its tower takes tiles of one size, "
                "and there are no fewer of them. Raise keep_ratio, or reduce with another method"
            )
        thumbnail = mm_item.tiles[-1:]
        rows, cols = self.geometry.tile_grid(*mm_item.original_size, max_tiles=max(1, most - 1))
        if rows * cols == 1:
            return replace(mm_item, tiles=thumbnail)
        side, was = self.geometry.tile_px, self.geometry.tile_grid(*mm_item.original_size)
        canvas = mm_item.tiles[:-1].reshape(*was, side, side, 3).swapaxes(1, 2)
        canvas = canvas.reshape(was[0] * side, was[1] * side, 3)
        return replace(mm_item, tiles=np.concatenate([self._cut(canvas, rows, cols), thumbnail]))

    def max_nbytes(self, num_frames: int) -> int:
        """See `Preprocessor.max_nbytes`: any may be an image of `most_tiles`; a count does not say its kind."""
        return num_frames * self.geometry.most_tiles * self.geometry.tile_px**2 * 3

    def _tiles(self, frame: np.ndarray) -> np.ndarray:
        """The tiles in raster order and, behind several, the whole picture once more: [n, side, side, 3]."""
        rows, cols = self.geometry.tile_grid(*frame.shape[:2])
        tiles = self._cut(frame, rows, cols)
        if len(tiles) == 1:
            return tiles
        side = self.geometry.tile_px
        return np.concatenate([tiles, resize(frame, side, side, self.image_resample)[None]])

    def _cut(self, frame: np.ndarray, rows: int, cols: int) -> np.ndarray:
        side = self.geometry.tile_px
        canvas = resize(frame, rows * side, cols * side, self.image_resample)
        return canvas.reshape(rows, side, cols, side, 3).swapaxes(1, 2).reshape(rows * cols, side, side, 3)


def internvl_preprocessor(files: ModelFiles, geometry: TileGroupGeometry) -> TileGroupPreprocessor:
    """Make the preprocessor that an InternVL's files describe.

    Raises:
        ModelLoadError: the files contradict one another, or ask for a step that is not supported.
    """
    image, video = files.image_processor, files.video_processor
    for section in (image, video):
        _check_steps(section, geometry.tile_px)
    for key in ("image_mean", "image_std"):
        if list(image[key]) != list(video[key]):
            raise ModelLoadError(f"{video.where} and {image.where} differ in {key!r}; one model has one normalisation")
    rescale_factor = image.get("rescale_factor", 1 / 255)
    if video.get("rescale_factor", 1 / 255) != rescale_factor:
        raise ModelLoadError(f"{video.where} and {image.where} differ in 'rescale_factor'; one model has one")
    return TileGroupPreprocessor(
        model_type=files.model_type,
        geometry=geometry,
        image_resample=image.get("resample", _BICUBIC),
        video_resample=video.get("resample", _BICUBIC),
        rescale_factor=rescale_factor,
        mean=tuple(image["image_mean"]),
        std=tuple(image["image_std"]),
    )


def _check_steps(section: JsonSection, tile_px: int) -> None:
    """Refuse a processor configuration whose steps are not resize, rescale, normalise to the tower's square tile."""
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False}
    for key, expected in steps.items():
        given = section.get(key)
        if given is not None and bool(given) != expected:
            raise ModelLoadError(f"{section.where} sets {key}: {given}; only {expected} is supported")
    size = section["size"]
    if (size.get("height"), size.get("width")) != (tile_px, tile_px):
        raise ModelLoadError(f"{section.where} has size {size}; the vision tower takes {tile_px}x{tile_px} px")

"""Frames to tiles at model size: uint8 in, uint8 out. Runs in the readers: imports neither torch nor transformers.

Rescaling and normalisation happen later, on the device; the preprocessor only carries their constants. Knows nothing
of files that hold media, of tokens or of reduction.

Source: transformers 5.23, models/llava_onevision/image_processing_pil_llava_onevision.py, tested equal to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from illava.errors import ModelLoadError, PreprocessError
from illava.families.anyres import AnyresGeometry, load_geometry
from illava.model_files import JsonSection, ModelFiles, load_model_files

# The square of an image set's member is held in memory once: 805 MB at this side.
MAX_SQUARE_PX = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class VisualInput:
    """One medium at model size.

    Attributes:
        kind: ``image`` or ``video``.
        tiles: uint8 [n, H, W, 3], RGB: an image's tiles, base tile first; or a video's frames.
        original_size: (height, width) px before any resize.
    """

    kind: Literal["image", "video"]
    tiles: np.ndarray
    original_size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """Brings decoded frames to one model's input size. Small, picklable, without state.

    Attributes:
        model_type: of the family, as in config.json.
        geometry: tiles and canvases.
        image_resample: Pillow's number of the filter for images.
        video_resample: the same for video frames.
        rescale_factor, mean, std: the device later computes ``(x * rescale_factor - mean) / std`` per channel.
    """

    model_type: str
    geometry: AnyresGeometry
    image_resample: int
    video_resample: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def images(self, frames: Sequence[np.ndarray]) -> tuple[VisualInput, ...]:
        """The images of one request, in order. One alone is tiled; of several each is one padded square.

        Args:
            frames: uint8 [H, W, 3] RGB each, of any sizes.

        Raises:
            PreprocessError: no image, one of the wrong dtype or shape, or one of several above `MAX_SQUARE_PX`.
        """
        if len(frames) == 0:
            raise PreprocessError("no images given; a request needs at least one")
        for index, frame in enumerate(frames):
            _check_frame(frame, f"image {index}")
        tile = self._anyres if len(frames) == 1 else self._padded_square
        return tuple(VisualInput("image", tile(frame), frame.shape[:2]) for frame in frames)

    def video(self, frames: np.ndarray | Sequence[np.ndarray]) -> VisualInput:
        """A video's frames, each resized to the tower's square input.

        Args:
            frames: uint8 [F, H, W, 3] RGB, or F frames of one size.

        Raises:
            PreprocessError: no frames, frames of the wrong dtype or shape, or of different sizes.
        """
        if len(frames) == 0:
            raise PreprocessError("no frames given; a video needs at least one")
        side = self.geometry.tile_px
        tiles = np.empty((len(frames), side, side, 3), np.uint8)
        for index, frame in enumerate(frames):
            _check_frame(frame, f"video frame {index}")
            if frame.shape != frames[0].shape:
                raise PreprocessError(
                    f"video frame {index} is {_size(frame)} px, frame 0 is {_size(frames[0])} px; "
                    "one video has one size: resize its frames, or give them as images"
                )
            tiles[index] = _resize(frame, side, side, self.video_resample)
        return VisualInput("video", tiles, frames[0].shape[:2])

    def max_nbytes(self, num_frames: int) -> int:
        """Upper bound of the bytes of a loaded item of ``num_frames`` frames or images, for admission control.

        One image may become many tiles, and a count of one does not say whether it is an image.
        """
        num_tiles = self.geometry.most_tiles if num_frames == 1 else num_frames
        return num_tiles * self.geometry.tile_px**2 * 3

    def _anyres(self, frame: np.ndarray) -> np.ndarray:
        """Base tile, then the tiles of the canvas in raster order: [n, side, side, 3]."""
        side = self.geometry.tile_px
        original_height, original_width = frame.shape[:2]
        canvas_height, canvas_width = self.geometry.best_resolution(original_height, original_width)
        height, width = _fit(original_height, original_width, canvas_height, canvas_width)
        top, left = (canvas_height - height) // 2, (canvas_width - width) // 2
        canvas = np.zeros((canvas_height, canvas_width, 3), np.uint8)
        canvas[top : top + height, left : left + width] = _resize(frame, height, width, self.image_resample)

        rows, cols = canvas_height // side, canvas_width // side
        tiles = np.empty((1 + rows * cols, side, side, 3), np.uint8)
        tiles[0] = _resize(frame, side, side, self.image_resample)
        tiles[1:].reshape(rows, cols, side, side, 3)[:] = canvas.reshape(rows, side, cols, side, 3).swapaxes(1, 2)
        return tiles

    def _padded_square(self, frame: np.ndarray) -> np.ndarray:
        """The whole image on a square of mean colour, as one tile: [1, side, side, 3]."""
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
        return _resize(square, side, side, self.image_resample)[None]


def _fit(height: int, width: int, canvas_height: int, canvas_width: int) -> tuple[int, int]:
    """Largest (height, width) of that aspect ratio on the canvas, rounded up.

    Source: transformers image_processing_utils.py:get_patch_output_size.
    """
    scale_rows, scale_cols = canvas_height / height, canvas_width / width
    if scale_cols < scale_rows:
        return min(math.ceil(height * scale_cols), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * scale_rows), canvas_width)


def _resize(frame: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((width, height), resample=Image.Resampling(resample)))


def _check_frame(frame: np.ndarray, name: str) -> None:
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        kind = frame.dtype if isinstance(frame, np.ndarray) else type(frame).__name__
        raise PreprocessError(f"{name} is {kind}; expected a numpy array of uint8, RGB, 0 to 255")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise PreprocessError(
            f"{name} has shape {list(frame.shape)}; expected [height, width, 3] with at least one pixel: "
            "convert grey or transparent pictures to RGB first"
        )


def _size(frame: np.ndarray) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"


def load_preprocessor(model_id: str, *, revision: str | None = None) -> Preprocessor:
    """The preprocessor of a model folder or hub id, from its JSON files alone (no weights, no torch).

    Args:
        model_id: local folder, or hub id.
        revision: hub commit; None for a local folder.

    Raises:
        ModelLoadError: a file or key is missing, the family is unknown, or the files ask for a step that this
            package does not do.
    """
    files = load_model_files(model_id, revision=revision)
    if files.model_type not in _BUILDERS:
        raise ModelLoadError(
            f"{model_id!r} is a {files.model_type!r} model; the families that can be preprocessed are: "
            f"{', '.join(sorted(_BUILDERS))}"
        )
    return _BUILDERS[files.model_type](files)


def _llava_onevision(files: ModelFiles) -> Preprocessor:
    image, video = files.image_processor, files.video_processor
    geometry = load_geometry(files)
    for section in (image, video):
        _check_steps(section, geometry.tile_px)
    for key in ("image_mean", "image_std", "rescale_factor"):
        if image[key] != video[key]:
            raise ModelLoadError(f"{video.where} and {image.where} differ in {key!r}; one model has one normalisation")
    if [list(pair) for pair in image["image_grid_pinpoints"]] != [list(pair) for pair in geometry.pinpoints]:
        raise ModelLoadError(f"{image.where} and {files.config.where} differ in 'image_grid_pinpoints'")
    return Preprocessor(
        model_type=files.model_type,
        geometry=geometry,
        image_resample=image["resample"],
        video_resample=video["resample"],
        rescale_factor=image["rescale_factor"],
        mean=tuple(image["image_mean"]),
        std=tuple(image["image_std"]),
    )


def _check_steps(section: JsonSection, tile_px: int) -> None:
    """Refuse a processor configuration whose steps are not resize, rescale, normalise to one square tile."""
    for key, expected in {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": None}.items():
        if bool(section.get(key, expected)) != bool(expected):
            raise ModelLoadError(f"{section.where} sets {key}: {section.get(key)}; only {bool(expected)} is supported")
    size = section["size"]
    if (size.get("height"), size.get("width")) != (tile_px, tile_px):
        raise ModelLoadError(f"{section.where} has size {size}; the vision tower takes {tile_px}x{tile_px} px")


_BUILDERS: dict[str, Callable[[ModelFiles], Preprocessor]] = {"llava_onevision": _llava_onevision}

"""Defines preprocessors, which bring frames to one model's input size: uint8 in, uint8 out.

They run in the readers, so this module imports neither torch nor transformers. `illava.families.load_preprocessor`
makes the preprocessor of a model. Rescaling and normalisation happen later, on the device; the preprocessor only holds
their constants.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from illava.errors import PreprocessError


@dataclass(frozen=True, slots=True, eq=False)
class VisualInput:
    """One image or video at model size: a visual input of a request.

    Attributes:
        kind: ``image`` or ``video``.
        tiles: uint8 [n, H, W, 3], RGB: an image's tiles, base tile first; or a video's frames.
        original_size: (height, width) px before any resize.
        timestamps_s: seconds of each frame of a video; empty where not known.
        representative: int64, for each cell (`Preprocessor.cells`) the cell that represents it: itself for a cell that
            enters the tower, another cell or -1 (none) for a cell that stage ``media`` leaves out. None: every cell
            enters.
        packet_bytes: of a video that was read from a file, for each frame the bytes that code what is new in it;
            empty where not known. The pipeline's readers take them from the container's index.
    """

    kind: Literal["image", "video"]
    tiles: np.ndarray
    original_size: tuple[int, int]
    timestamps_s: tuple[float, ...] = ()
    representative: np.ndarray | None = None
    packet_bytes: tuple[int, ...] = ()

    @property
    def num_left_out(self) -> int:
        """Cells that do not enter the tower."""
        return (
            0
            if self.representative is None
            else int((self.representative != np.arange(len(self.representative))).sum())
        )

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes

    def of_frames(self, frames: Sequence[int]) -> VisualInput:
        """The same video with these of its frames alone."""
        times_s = tuple(self.timestamps_s[n] for n in frames) if self.timestamps_s else ()
        sizes = tuple(self.packet_bytes[n] for n in frames) if self.packet_bytes else ()
        return replace(self, tiles=self.tiles[list(frames)], timestamps_s=times_s, packet_bytes=sizes)


@dataclass(frozen=True, slots=True, eq=False)
class VisualCells:
    """A visual input in cells, the smallest parts that can be left out of the tower: patches, or groups of them.

    Attributes:
        pixels_TX: uint8, each cell's pixels; for a video, those of all frames that its temporal patch spans.
        coord_T3: int64 (frame or tile, row, col), ascending; a frame is a temporal patch here.
        lengths: cells of each sequence of frames: a video is one sequence, every tile of an image is its own.
        padding_T: bool, cells beside the picture that the model itself drops.
    """

    pixels_TX: np.ndarray
    coord_T3: np.ndarray
    lengths: tuple[int, ...]
    padding_T: np.ndarray


@dataclass(frozen=True, slots=True)
class Preprocessor(ABC):
    """Brings decoded frames to one model's input size. It is small, picklable and has no state.

    Attributes:
        model_type: of the family, as in config.json.
        geometry: the family's arithmetic of sizes and counts.
        image_resample: Pillow's number of the filter for images.
        video_resample: the same for video frames; None where the model reads images only.
        rescale_factor, mean, std: the device later computes ``(x * rescale_factor - mean) / std`` per channel.
    """

    model_type: str
    geometry: Any
    image_resample: int
    video_resample: int | None
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @abstractmethod
    def images(self, frames: Sequence[np.ndarray]) -> tuple[VisualInput, ...]:
        """Prepare the images of one request, in order; uint8 [H, W, 3] RGB each, of any sizes."""

    @abstractmethod
    def video(self, frames: np.ndarray | Sequence[np.ndarray]) -> VisualInput:
        """Prepare a video's frames: uint8 [F, H, W, 3] RGB, or F frames of one size."""

    @abstractmethod
    def cells(self, mm_item: VisualInput) -> VisualCells:
        """Cut a prepared visual input into cells."""

    @abstractmethod
    def with_frames(self, mm_item: VisualInput, frames: Sequence[int]) -> VisualInput:
        """Keep these frames of a prepared video (temporal patches, where a model has them)."""

    @abstractmethod
    def shrink(self, mm_item: VisualInput, ratio: float) -> VisualInput:
        """Lower the resolution of a prepared visual input to about this share of its patches, never more.

        Raises:
            PreprocessError: this model reads such an input at one size only.
        """

    @abstractmethod
    def max_nbytes(self, num_frames: int) -> int:
        """Upper bound of the bytes of a loaded item of ``num_frames`` frames or images, for admission control."""


def resize(frame: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resize a frame to ``height`` x ``width`` px by Pillow's filter of that number."""
    return np.asarray(Image.fromarray(frame).resize((width, height), resample=Image.Resampling(resample)))


@cache
def resize_digest() -> str:
    """Return 16 hex digits over what `resize` makes of one test picture, by every filter, to larger and smaller sides.

    It tells whether two releases of Pillow resize alike, which their numbers do not: 13.0 makes other pixels than 12.3
    where one side grows and the other shrinks. Takes some milliseconds, once.
    """
    rows, cols = np.mgrid[0:67, 0:101]
    picture = np.stack([(rows * 37 + cols * 11) % 256, (rows * cols) % 256, (rows ^ cols) * 2 % 256], axis=2)
    digest = hashlib.sha256()
    for resample in range(
        6
    ):  # nearest, Lanczos, bilinear, bicubic, box, Hamming: a filter that comes later is no change
        for height, width in ((29, 40), (67, 50), (100, 201), (14, 210)):
            digest.update(resize(picture.astype(np.uint8), height, width, resample).tobytes())
    return digest.hexdigest()[:16]


def check_images(frames: Sequence[np.ndarray]) -> None:
    """Refuse frames that cannot be the images of a request.

    Raises:
        PreprocessError: no image, or one of the wrong dtype or shape.
    """
    if len(frames) == 0:
        raise PreprocessError("no images given; a request needs at least one")
    for index, frame in enumerate(frames):
        _check_frame(frame, f"image {index}")


def check_video(frames: np.ndarray | Sequence[np.ndarray]) -> None:
    """Refuse frames that cannot be the frames of a video.

    Raises:
        PreprocessError: no frames, frames of the wrong dtype or shape, or of different sizes.
    """
    if len(frames) == 0:
        raise PreprocessError("no frames given; a video needs at least one")
    for index, frame in enumerate(frames):
        _check_frame(frame, f"video frame {index}")
        if frame.shape != frames[0].shape:
            raise PreprocessError(
                f"video frame {index} is {_size(frame)} px, frame 0 is {_size(frames[0])} px; "
                "one video has one size: resize its frames, or give them as images"
            )


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


def square_video(frames: np.ndarray | Sequence[np.ndarray], side: int, resample: int) -> VisualInput:
    """Resize each frame of a video to one square tile of ``side`` pixels.

    Raises:
        PreprocessError: as `check_video`.
    """
    check_video(frames)
    tiles = np.empty((len(frames), side, side, 3), np.uint8)
    for index, frame in enumerate(frames):
        tiles[index] = resize(frame, side, side, resample)
    return VisualInput("video", tiles, frames[0].shape[:2])

"""Resizes frames to the native resolution of the Qwen families: uint8 in, uint8 out, of the picture's own shape.

It runs in the readers, so it imports neither torch nor transformers. An odd number of video frames stays odd here; the
device repeats the last one.

Source: transformers 5.23, models/qwen2_vl/image_processing_pil_qwen2_vl.py, tested equal to it; video processors need
torchvision there, so videos are tested against the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from illava.errors import ModelLoadError, PreprocessError
from illava.families.qwen.geometry import NativeGeometry
from illava.model_files import JsonSection, ModelFiles
from illava.preprocess import Preprocessor, VisualCells, VisualInput, check_images, check_video, resize

# Defaults of transformers' processor classes: mean and standard deviation.
_CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
_HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
_BICUBIC = 3


class NativePreprocessor(Preprocessor):
    """Resizes every image and frame to whole groups of patches near its own size."""

    __slots__ = ()
    geometry: NativeGeometry
    video_resample: int

    def images(self, frames: Sequence[np.ndarray]) -> tuple[VisualInput, ...]:
        """Prepare the images of one request, in order, each as one tile.

        Args:
            frames: uint8 [H, W, 3] RGB each, of any sizes.

        Raises:
            PreprocessError: no image, one of the wrong dtype or shape, or one that is too narrow.
        """
        check_images(frames)
        media = []
        for frame in frames:
            tile = resize(frame, *self.geometry.image_size(*frame.shape[:2]), self.image_resample)
            media.append(VisualInput("image", np.stack([tile]), frame.shape[:2]))
        return tuple(media)

    def video(self, frames: np.ndarray | Sequence[np.ndarray], *, timestamps_s: Sequence[float] = ()) -> VisualInput:
        """Resize all frames of a video to one size.

        Args:
            frames: uint8 [F, H, W, 3] RGB, or F frames of one size.
            timestamps_s: seconds of each frame, where known: some models read when a frame was.

        Raises:
            PreprocessError: no frames, frames of the wrong dtype or shape, of different sizes or too narrow; or
                timestamps of another number.
        """
        check_video(frames)
        if len(timestamps_s) not in (0, len(frames)):
            raise PreprocessError(f"{len(frames)} frames, but {len(timestamps_s)} timestamps; give one each, or none")
        height, width = self.geometry.video_size(len(frames), *frames[0].shape[:2])
        tiles = np.empty((len(frames), height, width, 3), np.uint8)
        for index, frame in enumerate(frames):
            tiles[index] = resize(frame, height, width, self.video_resample)
        return VisualInput("video", tiles, frames[0].shape[:2], tuple(timestamps_s))

    def cells(self, mm_item: VisualInput) -> VisualCells:
        """See `Preprocessor.cells`: a cell is a group of patches over the frames of one temporal patch."""
        depth = 1 if mm_item.kind == "image" else self.geometry.frames_per_patch
        num_frames, height, width = mm_item.tiles.shape[:3]
        grid, px = self.geometry.grid(mm_item.kind, num_frames, height, width), self.geometry.factor_px
        tiles = np.concatenate([mm_item.tiles, *[mm_item.tiles[-1:]] * (grid.times * depth - num_frames)])
        rows, cols = grid.groups
        cut = tiles.reshape(grid.times, depth, rows, px, cols, px, 3).transpose(0, 2, 4, 1, 3, 5, 6)
        return VisualCells(
            pixels_TX=cut.reshape(grid.num_groups, -1),
            coord_T3=np.indices((grid.times, rows, cols)).reshape(3, -1).T,
            lengths=(grid.num_groups,),
            padding_T=np.zeros(grid.num_groups, bool),
        )

    def with_frames(self, mm_item: VisualInput, frames: Sequence[int]) -> VisualInput:
        """See `Preprocessor.with_frames`: whole temporal patches."""
        depth, num_frames = self.geometry.frames_per_patch, len(mm_item.tiles)
        index = [n for frame in frames for n in range(frame * depth, min((frame + 1) * depth, num_frames))]
        return mm_item.of_frames(index)

    def shrink(self, mm_item: VisualInput, ratio: float) -> VisualInput:
        """See `Preprocessor.shrink`: multiply both sides by the root of the ratio, rounded down to whole groups."""
        height, width = mm_item.tiles.shape[1:3]
        factor = self.geometry.factor_px
        low, narrow = (max(1, int(side / factor * ratio**0.5 + 1e-6)) * factor for side in (height, width))
        if (low, narrow) == (height, width):
            raise PreprocessError(
                f"a {mm_item.kind} of {width}x{height} px at model size has too few groups of {factor} px to be read "
                f"at {ratio:g} of them; lower keep_ratio, or reduce with another method"
            )
        resample = self.image_resample if mm_item.kind == "image" else self.video_resample
        return replace(mm_item, tiles=np.stack([resize(tile, low, narrow, resample) for tile in mm_item.tiles]))

    def max_nbytes(self, num_frames: int) -> int:
        """See `Preprocessor.max_nbytes`; the larger of both bounds, since a count may be of images or of frames."""
        return self.geometry.max_pixels(num_frames) * 3


def qwen2_preprocessor(files: ModelFiles, geometry: NativeGeometry) -> NativePreprocessor:
    """Make the preprocessor that the files of a Qwen2-VL or Qwen2.5-VL describe."""
    return _build(files, geometry, video_default=_CLIP)


def qwen3_preprocessor(files: ModelFiles, geometry: NativeGeometry) -> NativePreprocessor:
    """Make the preprocessor of a Qwen3-VL's files: images as in Qwen2-VL, videos by a processor of their own."""
    return _build(files, geometry, video_default=_HALF)


def _build(
    files: ModelFiles, geometry: NativeGeometry, *, video_default: tuple[list[float], list[float]]
) -> NativePreprocessor:
    """Read the files.

    Raises:
        ModelLoadError: the files contradict one another, or ask for a step that is not supported.
    """
    image, video = files.image_processor, files.video_processor
    for section in (image, video):
        _check_steps(section)
    mean, std = image.get("image_mean", _CLIP[0]), image.get("image_std", _CLIP[1])
    for key, ours, own_default in (("image_mean", mean, video_default[0]), ("image_std", std, video_default[1])):
        if list(video.get(key, own_default)) != list(ours):
            raise ModelLoadError(f"{video.where} and {image.where} differ in {key!r}; one model has one normalisation")
    rescale_factor = image.get("rescale_factor", 1 / 255)
    if video.get("rescale_factor", 1 / 255) != rescale_factor:
        raise ModelLoadError(f"{video.where} and {image.where} differ in 'rescale_factor'; one model has one")
    return NativePreprocessor(
        model_type=files.model_type,
        geometry=geometry,
        image_resample=image.get("resample", _BICUBIC),
        video_resample=video.get("resample", _BICUBIC),
        rescale_factor=rescale_factor,
        mean=tuple(mean),
        std=tuple(std),
    )


def _check_steps(section: JsonSection) -> None:
    """Refuse a processor configuration with steps other than resize, rescale, normalise."""
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": True, "cap_pixels_per_frame": False}
    for key, expected in steps.items():
        given = section.get(key)
        if given is not None and bool(given) != expected:
            raise ModelLoadError(f"{section.where} sets {key}: {given}; only {expected} is supported")

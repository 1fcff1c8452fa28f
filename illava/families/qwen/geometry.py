"""Does the native-resolution arithmetic of the Qwen towers: the size a picture is resized to, and its grid of patches.

Integers only: no pixels, no tensors, no torch, so readers and dry runs may use it.

Source: transformers 5.23, models/qwen2_vl/{image_processing_pil,video_processing}_qwen2_vl.py and
models/qwen3_vl/video_processing_qwen3_vl.py. Copied in behaviour, down to the rounding, and tested equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from illava.errors import ModelLoadError, PreprocessError
from illava.model_files import JsonSection, ModelFiles
from illava.pixel_limits import NO_LIMITS, PixelLimits

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, slots=True)
class PixelRange:
    """Bounds the pixels of a resized picture; for a video, of each frame or of the whole clip."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """Holds the grid of patches of one visual input.

    Attributes:
        times: temporal patches; 1 for an image. Each is one segment of the tower's attention.
        rows, cols: rows and columns of patches in each.
        side: patches per side of a group, which the merger joins into one vision token.
    """

    times: int
    rows: int
    cols: int
    side: int

    @property
    def num_patches(self) -> int:
        return self.times * self.rows * self.cols

    @property
    def groups(self) -> tuple[int, int]:
        """(rows, cols) of groups of one temporal patch."""
        return self.rows // self.side, self.cols // self.side

    @property
    def num_groups(self) -> int:
        return self.num_patches // self.side**2


@dataclass(frozen=True, slots=True)
class NativeGeometry:
    """Computes sizes and grids of one model.

    Attributes:
        patch_px: side of a patch.
        group_side: patches per side of a group.
        frames_per_patch: frames that one temporal patch spans.
        image_pixels: of one image.
        video_pixels: of one frame, or of all frames together, as ``video_budget`` says.
        video_budget: ``frame`` (Qwen2-VL, Qwen2.5-VL) or ``clip`` (Qwen3-VL).
        limits: what a user bounds of a video's frames beside these ranges; see `within`.
    """

    patch_px: int
    group_side: int
    frames_per_patch: int
    image_pixels: PixelRange
    video_pixels: PixelRange
    video_budget: Literal["frame", "clip"] = "frame"
    limits: PixelLimits = NO_LIMITS

    @property
    def factor_px(self) -> int:
        """Both sides of a resized picture are multiples of this: the side of a group."""
        return self.patch_px * self.group_side

    def within(self, limits: PixelLimits) -> NativeGeometry:
        """The same model with these bounds in place of its files' own.

        Source: ``min_pixels`` and ``max_pixels`` of Qwen2VLImageProcessor; ``min_pixels``, ``max_pixels`` and
        ``total_pixels`` of qwen-vl-utils 0.0.14, vision_process.py:fetch_video, which are of one frame in every family,
        and the same in transformers 5.23 with ``cap_pixels_per_frame`` (see `video_pixels_of`).

        Raises:
            ModelLoadError: a picture would have to be larger than ``max_pixels`` to be as large as ``min_pixels``.
        """
        images = _within(self.image_pixels, limits, "images")
        frames = _within(self.video_pixels, limits, "video frames") if self.video_budget == "frame" else None
        return replace(self, image_pixels=images, video_pixels=frames or self.video_pixels, limits=limits)

    def video_pixels_of(self, num_frames: int) -> PixelRange:
        """The range of pixels of a video of so many frames: of each frame, or of the whole clip (``video_budget``).

        Source: transformers 5.23, the ``resize`` of both video processors with ``cap_pixels_per_frame``, whose token
        limits are pixels here. There the clip's ``shortest_edge`` is a floor of each frame; here ``min_pixels`` is.
        """
        least, most = self.video_pixels.least, self.video_pixels.most
        total, depth = self.limits.total_pixels, self.frames_per_patch
        if self.video_budget == "frame":
            if total is not None:
                most = max(min(most, total * depth // num_frames), int(least * 1.05))
            return PixelRange(least, most)
        of_frame = self.limits
        if total is not None:
            most = total * depth
        if of_frame.max_pixels is not None:
            most = min(of_frame.max_pixels, most // num_frames) * num_frames
        if of_frame.min_pixels is not None:
            least = of_frame.min_pixels * num_frames
            most = max(most, int(of_frame.min_pixels * 1.05) * num_frames)
        return PixelRange(min(least, most), most)

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) px an image is resized to.

        Raises:
            PreprocessError: one side is more than `MAX_ASPECT_RATIO` times the other.
        """
        return smart_resize(height, width, factor_px=self.factor_px, pixels=self.image_pixels)

    def video_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) px every frame of a video is resized to.

        Raises:
            PreprocessError: as `image_size`.
        """
        if self.video_budget == "frame":
            return smart_resize(height, width, factor_px=self.factor_px, pixels=self.video_pixels_of(num_frames))
        # A single frame is repeated in its temporal patch. Transformers refuses it; here it counts as two frames.
        num_frames = max(num_frames, self.frames_per_patch)
        smallest = min(height, width)
        if smallest < self.factor_px:
            scale = self.factor_px / smallest
            height, width = int(height * scale), int(width * scale)
        return smart_resize(
            height,
            width,
            factor_px=self.factor_px,
            pixels=self.video_pixels_of(num_frames),
            num_frames=num_frames,
            counted_frames=round(num_frames / self.frames_per_patch) * self.frames_per_patch,
        )

    def grid(self, kind: Literal["image", "video"], num_frames: int, height: int, width: int) -> PatchGrid:
        """The grid of a visual input of ``num_frames`` frames that has its model size already."""
        times = 1 if kind == "image" else -(-num_frames // self.frames_per_patch)
        return PatchGrid(times, height // self.patch_px, width // self.patch_px, self.group_side)

    def grid_of(self, kind: Literal["image", "video"], num_frames: int, height: int, width: int) -> PatchGrid:
        """The grid of a visual input of ``num_frames`` frames before any resize."""
        size = self.image_size(height, width) if kind == "image" else self.video_size(num_frames, height, width)
        return self.grid(kind, num_frames, *size)

    def max_pixels(self, num_frames: int) -> int:
        """Upper bound of the pixels of ``num_frames`` images, or of a video of as many frames, after the resize."""
        images = num_frames * self._bound(self.image_pixels)
        video = self._bound(self.video_pixels_of(max(num_frames, self.frames_per_patch)))
        if self.video_budget == "clip":  # five frames are counted as four
            return max(images, video + video // 4, num_frames * MAX_ASPECT_RATIO * self.factor_px**2)
        return max(images, num_frames * video)

    def _bound(self, pixels: PixelRange) -> int:
        """Upper bound of one picture: on a long picture, rounding up to whole groups may exceed the range."""
        rounded_up = pixels.least + 15 * self.factor_px * math.isqrt(pixels.least) + self.factor_px**2
        return max(pixels.most, rounded_up, MAX_ASPECT_RATIO * self.factor_px**2)


def smart_resize(
    height: int, width: int, *, factor_px: int, pixels: PixelRange, num_frames: int = 1, counted_frames: int = 1
) -> tuple[int, int]:
    """Find the (height, width) px nearest to a picture's own that are whole groups and within a range of pixels.

    Args:
        height, width: of the picture, px.
        factor_px: both sides become multiples of it.
        pixels: the range; of a clip, over all its frames.
        num_frames: frames that share the range.
        counted_frames: the same rounded to whole temporal patches; decides whether the range is kept.

    Raises:
        PreprocessError: one side is more than `MAX_ASPECT_RATIO` times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise PreprocessError(
            f"a picture of {width}x{height} px is more than {MAX_ASPECT_RATIO} times as long as it is wide; this model "
            "takes none of these: crop it first"
        )
    rounded = round(height / factor_px) * factor_px, round(width / factor_px) * factor_px
    if counted_frames * rounded[0] * rounded[1] > pixels.most:
        shrink = math.sqrt((num_frames * height * width) / pixels.most)
        return _whole_groups(math.floor, height / shrink, width / shrink, factor_px)
    if counted_frames * rounded[0] * rounded[1] < pixels.least:
        grow = math.sqrt(pixels.least / (num_frames * height * width))
        return _whole_groups(math.ceil, height * grow, width * grow, factor_px)
    return rounded


def _whole_groups(rounding: Callable[[float], int], height: float, width: float, factor_px: int) -> tuple[int, int]:
    rows, cols = rounding(height / factor_px), rounding(width / factor_px)
    return max(1, rows) * factor_px, max(1, cols) * factor_px


# The default of transformers' processors in all of these families.
_IMAGE_PIXELS = PixelRange(56**2, 1280 * 28**2)


def qwen2_geometry(files: ModelFiles) -> NativeGeometry:
    """Read sizes and grids from the files of a Qwen2-VL or Qwen2.5-VL."""
    return _load(files, patch_px=14, video=PixelRange(128 * 28**2, 768 * 28**2), video_budget="frame")


def qwen3_geometry(files: ModelFiles) -> NativeGeometry:
    """Read sizes and grids from the files of a Qwen3-VL."""
    return _load(files, patch_px=16, video=PixelRange(128 * 32**2, 768 * 32**2), video_budget="clip")


def model_depth(files: ModelFiles) -> tuple[int, int]:
    """Read the blocks of the tower, and the layers of the LLM, which older files keep beside the tower's section."""
    text = files.config.section("text_config") if files.config.get("text_config") else files.config
    return files.config.section("vision_config")["depth"], text["num_hidden_layers"]


def _load(
    files: ModelFiles, *, patch_px: int, video: PixelRange, video_budget: Literal["frame", "clip"]
) -> NativeGeometry:
    """Read the files; the arguments are transformers' defaults for keys that the files leave out.

    Raises:
        ModelLoadError: the processors' patches are not the tower's.
    """
    vision = files.config.section("vision_config")
    ours = {
        "patch_size": vision.get("patch_size", patch_px),
        "merge_size": vision.get("spatial_merge_size", 2),
        "temporal_patch_size": vision.get("temporal_patch_size", 2),
    }
    for section, default_px in ((files.image_processor, 14), (files.video_processor, patch_px)):
        for key, default in (("patch_size", default_px), ("merge_size", 2), ("temporal_patch_size", 2)):
            if section.get(key, default) != ours[key]:
                raise ModelLoadError(
                    f"{section.where} has {key} {section.get(key, default)}, the tower in {files.config.where} has "
                    f"{ours[key]}; these files are not of one model"
                )
    return NativeGeometry(
        patch_px=ours["patch_size"],
        group_side=ours["merge_size"],
        frames_per_patch=ours["temporal_patch_size"],
        image_pixels=_pixels(files.image_processor, _IMAGE_PIXELS),
        video_pixels=_pixels(files.video_processor, video),
        video_budget=video_budget,
    )


def _within(pixels: PixelRange, limits: PixelLimits, what: str) -> PixelRange:
    least = pixels.least if limits.min_pixels is None else limits.min_pixels
    most = pixels.most if limits.max_pixels is None else limits.max_pixels
    if least > most:
        set_one, other = ("max_pixels", "min_pixels") if limits.min_pixels is None else ("min_pixels", "max_pixels")
        value, theirs = (most, least) if set_one == "max_pixels" else (least, most)
        raise ModelLoadError(
            f"{set_one} is {value}, and this model's {what} have {other} {theirs}; set {other} as well"
        )
    return PixelRange(least, most)


def _pixels(section: JsonSection, default: PixelRange) -> PixelRange:
    """Read the range; ``min_pixels`` and ``max_pixels`` take precedence over ``size``, as in transformers."""
    size: dict[str, Any] = section.get("size") or {"shortest_edge": default.least, "longest_edge": default.most}
    least = section.get("min_pixels") or size.get("shortest_edge")
    most = section.get("max_pixels") or size.get("longest_edge")
    if not least or not most:
        raise ModelLoadError(f"{section.where} has size {size}; expected shortest_edge and longest_edge, in pixels")
    return PixelRange(least, most)

"""A preprocessor that leaves pictures as they are decoded, for what wants the pixels of a file and no model's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from illava.preprocess import Preprocessor, VisualCells, VisualInput


class PlainPictures(Preprocessor):
    """Gives each picture or page as one tile of its own size; videos it does not read."""

    def __init__(self) -> None:
        super().__init__("plain", None, 0, None, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def images(self, frames: Sequence[np.ndarray]) -> tuple[VisualInput, ...]:
        return tuple(VisualInput("image", frame[None], frame.shape[:2]) for frame in frames)

    def video(self, frames: np.ndarray | Sequence[np.ndarray]) -> VisualInput:
        raise NotImplementedError("frames are read by a model's own preprocessor")

    def cells(self, mm_item: VisualInput) -> VisualCells:
        raise NotImplementedError("there are no patches without a model")

    def with_frames(self, mm_item: VisualInput, frames: Sequence[int]) -> VisualInput:
        raise NotImplementedError("frames are read by a model's own preprocessor")

    def shrink(self, mm_item: VisualInput, ratio: float) -> VisualInput:
        raise NotImplementedError("there is no model to shrink for")

    def max_nbytes(self, num_frames: int) -> int:
        raise NotImplementedError("nothing is admitted by it")

"""Tells documents, images and videos apart by cheap statistics of their pixels; `budget: auto` chooses by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from illava.preprocess import Preprocessor, VisualCells, VisualInput
from illava.requests import ContentKind

UNIQUE_SHARE_OF_DOCUMENTS = 0.75
_LEVELS_SHIFT = 4  # 16 levels a colour: a scanner's or a codec's noise makes no cell unique


@dataclass(frozen=True, slots=True)
class ContentStatistics:
    """Statistics of one visual input at model size; cells are patches, or groups of them, at 16 levels a colour.

    Attributes:
        padding_share: share of cells beside the picture.
        frame_similarity: of cells with a frame before theirs, the share that equals the cell there; 0 for an image.
        unique_share: of all other cells, the share of different ones. A tile that equals the base tile (of a picture no
            larger than a tile) is not counted twice.
    """

    padding_share: float
    frame_similarity: float
    unique_share: float

    @classmethod
    def of(cls, cells: VisualCells) -> ContentStatistics:
        """Measure the cells of a visual input."""
        levels_TX = np.ascontiguousarray(cells.pixels_TX >> _LEVELS_SHIFT)
        frame_T = cells.coord_T3[:, 0]
        per_frame = int((frame_T == 0).sum())
        repeated_T, is_video = np.zeros(len(frame_T), bool), len(cells.lengths) == 1 and len(frame_T) > per_frame
        if is_video:
            repeated_T[per_frame:] = (levels_TX[per_frame:] == levels_TX[:-per_frame]).all(1)
        else:
            tiles_FPX = levels_TX.reshape(-1, per_frame, levels_TX.shape[1])
            is_base_F = (tiles_FPX == tiles_FPX[:1]).all((1, 2))
            repeated_T[per_frame:] = is_base_F[1:].repeat(per_frame)
        told_T = ~repeated_T & ~cells.padding_T
        rows = levels_TX[told_T].view(f"V{levels_TX.shape[1]}")
        return cls(
            padding_share=float(cells.padding_T.mean()),
            frame_similarity=float(repeated_T[per_frame:].mean()) if is_video else 0.0,
            unique_share=len({row.tobytes() for row in rows}) / max(1, len(rows)),
        )


def content_kind(preprocessor: Preprocessor, media: Sequence[VisualInput]) -> ContentKind:
    """The kind of a request's media: ``document`` if any of them is one, else ``video`` if any is one, else ``image``.

    A document repeats itself: at most three quarters of its cells differ from one another. Cells that repeat the frame
    before, and the canvas's padding, are not counted. Slides and screens are documents too, also in videos.
    """
    statistics = [ContentStatistics.of(preprocessor.cells(mm_item)) for mm_item in media]
    if any(own.unique_share <= UNIQUE_SHARE_OF_DOCUMENTS for own in statistics):
        return "document"
    return "video" if any(mm_item.kind == "video" for mm_item in media) else "image"

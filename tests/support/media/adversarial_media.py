"""Describes an adversarial file of the corpus: how it is written, and exactly what a loader must make of it.

The files are in `adversarial_videos`, `adversarial_pictures` and `adversarial_documents`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VALUE = 4711  # the barcode of every video
NUM_FRAMES = 20  # of every video that says nothing else, 10 a second
CHOSEN = (0, 6, 12, 19)  # four frames of them
MEDIA = {"num_frames": 4, "load_timeout_s": 60}

# The corners of every picture, clockwise from the top left: a mirrored or turned one cannot pass for the right one.
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


@dataclass(frozen=True, slots=True)
class AdversarialFile:
    """Holds one file and its expected outcome.

    Attributes:
        name: name of the file.
        write: writes the file to a path.
        outcome: ``ok``, ``partial``, or the error type of a failed row.
        kind: media kind of the item.
        says: words of the error, or of the reason for ``partial``.
        shape: height and width of every frame; None where nothing is loaded or the shape does not matter.
        frames: numbers that a video's frames carry where it is ok.
        undo: rotates and mirrors a shown frame back, so that its number can be read.
        value: barcode of a video.
        corners: corner colours of a picture, which may be off by ``tolerance``.
        decoder: decoder that must have read the file; "" where it does not matter.
        media: configuration that differs from `MEDIA`.
    """

    name: str
    write: Callable[[Path], Any]
    outcome: str = "ok"
    kind: str = "video"
    says: str = ""
    shape: tuple[int, int] | None = None
    frames: tuple[int, ...] | None = CHOSEN
    undo: Callable[[np.ndarray], np.ndarray] = np.asarray
    value: int = VALUE
    corners: tuple[tuple[int, int, int], ...] = CORNERS
    tolerance: int = 0
    decoder: str = ""
    media: dict[str, Any] = field(default_factory=dict)


def holding(data: bytes) -> Callable[[Path], Any]:
    """Writes these bytes."""
    return lambda path: path.write_bytes(data)

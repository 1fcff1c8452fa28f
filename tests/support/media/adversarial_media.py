"""What an awkward file of the corpus is: how it is written, and exactly what a loader must make of it.

The files are in `awkward_videos`, `awkward_pictures` and `awkward_documents`. Knows nothing of the pipeline.
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
class AwkwardFile:
    """One file and its outcome.

    Attributes:
        name: of the file.
        write: makes it at a path.
        outcome: ``ok``, ``partial``, or the error type of a failed row.
        kind: of the item.
        says: words of the error, or of what is partial.
        shape: height and width of every frame; None where nothing is loaded or it is not the point.
        frames: of a video, the numbers its frames carry where it is ok.
        undo: turns and mirrors a shown frame back, so that its number can be read.
        value: the barcode of a video.
        corners: of a picture, whose colours may be off by ``tolerance``.
        decoder: that must have read it; "" where it does not matter.
        media: what differs from `MEDIA`.
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

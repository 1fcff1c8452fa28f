"""Derives from a container's display matrix how a decoded picture is rotated and mirrored before it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ItemError

_MAX_SKEW = 0.01  # bound on an entry that should be zero, as a share of the largest: phones write rounded matrices


@dataclass(frozen=True, slots=True)
class Orientation:
    """Rotates and mirrors: rows and columns are exchanged or not, and then each is reversed or not."""

    is_transposed: bool = False
    reverses_columns: bool = False
    reverses_rows: bool = False

    @property
    def is_mirrored(self) -> bool:
        """Whether no rotation alone has the same effect."""
        return self.is_transposed ^ self.reverses_columns ^ self.reverses_rows

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Return the picture, uint8 [H, W, 3], as it must be shown."""
        if self.is_transposed:
            picture = picture.swapaxes(0, 1)
        rows, columns = (slice(None, None, -1 if back else 1) for back in (self.reverses_rows, self.reverses_columns))
        return np.ascontiguousarray(picture[rows, columns])


UPRIGHT = Orientation()


def orientation_of(matrix: Sequence[int]) -> Orientation:
    """Read the nine entries a b u c d v x y w, which show a point (x, y) at (a x + c y, b x + d y).

    A matrix of zeros, which some writers leave, means no rotation.

    Raises:
        ItemError: ``unsupported_media`` for anything but quarter turns and mirrors.
    """
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    slight = _MAX_SKEW * max(map(abs, (a, b, c, d)))
    if slight == 0:
        return UPRIGHT
    straight, across = min(abs(a), abs(d)) > slight, min(abs(b), abs(c)) > slight
    if straight == across or (max(abs(b), abs(c)) if straight else max(abs(a), abs(d))) > slight:
        raise ItemError(
            "unsupported_media",
            "the display matrix shows the picture skewed; only turns by multiples of 90 degrees and mirrors are read",
        )
    return Orientation(False, a < 0, d < 0) if straight else Orientation(True, c < 0, b < 0)

"""Defines a picture of a page, in tiles that flow side by side, and what a template shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.report.html import base64_of
from pipeline.report.raster import png


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Holds one tile, frame, page or map.

    Attributes:
        label: stands above it.
        pixels_HW3: uint8 RGB.
    """

    label: str
    pixels_HW3: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Holds a picture, or the reason why there is none.

    Attributes:
        caption: what it shows.
        tiles: none where it cannot be had.
        reason: why not.
    """

    caption: str
    tiles: Sequence[Tile] = ()
    reason: str = ""


def shown(picture: Picture) -> dict[str, Any]:
    """Return the picture as the template ``figure.html.jinja`` takes it."""
    tiles = [{"label": tile.label, "data": base64_of(png(tile.pixels_HW3))} for tile in picture.tiles]
    return {"caption": picture.caption, "reason": picture.reason, "tiles": tiles}

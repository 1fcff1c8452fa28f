"""Defines `PixelLimits`: how large a user lets a model read pictures, in the words of the models' own processors."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """Bounds the size that pictures are brought to; None leaves what the model's files say.

    Families of native resolution take the first three, tiled families the last.

    Attributes:
        max_pixels: of one image, or of one frame of a video, after the resize.
        min_pixels: the same, at least.
        total_pixels: of the temporal patches of one video, after the resize; every frame gets an even share.
        max_tiles: tiles that an image is cut into at most, base tile apart: canvases of more tiles are not used.
    """

    max_pixels: int | None = None
    min_pixels: int | None = None
    total_pixels: int | None = None
    max_tiles: int | None = None

    @property
    def named(self) -> dict[str, int]:
        """The limits that are set, by name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


NO_LIMITS = PixelLimits()

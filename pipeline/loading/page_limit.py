"""Says how many pages of a document are read (`num_pages_read`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import ItemError

if TYPE_CHECKING:
    from pipeline.config.schema import MediaConfig
    from pipeline.records import MediaKind


def page_limit(kind: MediaKind, media: MediaConfig) -> tuple[str, int]:
    """Return the key that limits the pages of a document, and its value."""
    if kind != "document" and media.max_images < media.max_pages:
        return "media.max_images", media.max_images
    return "media.max_pages", media.max_pages


def num_pages_read(kind: MediaKind, num_pages: int, media: MediaConfig, *, in_windows: bool = True) -> int:
    """Return how many pages of so many are read.

    Args:
        kind: of the document's files.
        num_pages: that it has.
        media: the limits.
        in_windows: whether pages are asked about window by window; one answer about all of them needs all of them.

    Raises:
        ItemError: there is none, or they are too many and all are needed, or ``over_max_pages`` says ``fail``.
    """
    key, limit = page_limit(kind, media)
    if num_pages == 0:
        raise ItemError("empty_media", "the document has no pages")
    if num_pages > limit and not (in_windows and media.over_max_pages == "first"):
        name = key.removeprefix("media.")
        why = ", over_max_pages fail" if in_windows else ""
        raise ItemError("too_large", f"the document has {num_pages:,} pages; {name} is {limit:,}{why}")
    return min(num_pages, limit)

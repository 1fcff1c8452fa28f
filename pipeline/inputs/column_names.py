"""Knows the columns that a user's manifest may have, and finds names that were probably meant to be one of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Another name of a column, which means the same.
ALIASES = {"item_id": "id", "prompt": "question"}
KNOWN_COLUMNS = (
    "uri",
    "uris",
    "item_id",
    "id",
    "media_kind",
    "prompt",
    "question",
    "question_id",
    "options",
    "reference",
    "category",
    "metric",
    "size",
    "etag",
    "password",
)
_ADDRESS_WORDS = frozenset({"file", "file_name", "filename", "image", "images", "path", "url", "urls", "video"})
_CLOSE = 0.84  # of `difflib`: one letter more, less or exchanged in a word of six


def near_misses(names: Iterable[str]) -> dict[str, str]:
    """Map each name that is nearly a known column's to that column, where the manifest lacks the column itself."""
    given = set(names)
    missing = [name for name in KNOWN_COLUMNS if name not in given and not _said_otherwise(name, given)]
    found = {}
    for name in sorted(given - set(KNOWN_COLUMNS)):
        plain = re.sub(r"[^a-z0-9]+", "_", name.strip().lstrip("\ufeff").lower()).strip("_")
        near = [plain] if plain in missing else difflib.get_close_matches(plain, missing, 1, _CLOSE)
        if near:
            found[name] = near[0]
    return found


def meant_as_address(names: Iterable[str]) -> str | None:
    """Return the name that probably holds the addresses of a manifest with neither `uri` nor `uris`; None for none."""
    names = list(names)
    near = near_misses(names)
    for name in names:
        if near.get(name) in {"uri", "uris"} or name.strip().lower() in _ADDRESS_WORDS:
            return name
    return None


def _said_otherwise(name: str, given: set[str]) -> bool:
    """Whether the column is there under its other name."""
    pairs = [*ALIASES.items(), ("uri", "uris")]
    return any(name in pair and given & set(pair) for pair in pairs)

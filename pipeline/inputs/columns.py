"""Checks and rewrites whole columns of addresses, kinds and ids: pure functions that read no object."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ItemError
from pipeline.inputs.arrow_text import json_text
from pipeline.storage.uris import FORBIDDEN_PATTERN, OBJECT_URI_PATTERN, check_uri, printable

if TYPE_CHECKING:
    from pipeline.records import MediaKind

# What the decoders read (`pipeline.loading.decoding`): every container and picture format there under its usual names.
VIDEO_EXTENSIONS = ("mp4", "mov", "m4v", "mkv", "webm", "avi", "ts", "mts", "m2ts")
DOCUMENT_EXTENSIONS = ("pdf", "tif", "tiff")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")  # gif is left out: the name does not say whether it moves
# Came later: a listing that an earlier version froze lacks them (`pipeline.inputs.manifest.Manifest.first_extensions`).
LATER_VIDEO_EXTENSIONS = ("3gp", "3g2", "qt", "f4v", "m2t")
LATER_IMAGE_EXTENSIONS = ("jpe", "jfif", "dib")
Refuse = Callable[[list[int], str], NoReturn]
_EXTENSIONS = {
    "video": VIDEO_EXTENSIONS + LATER_VIDEO_EXTENSIONS,
    "image": IMAGE_EXTENSIONS + LATER_IMAGE_EXTENSIONS,
    "document": DOCUMENT_EXTENSIONS,
}
_SCHEME = r"^[A-Za-z][A-Za-z0-9+.-]*:/"


def kinds_of(uris: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return ``video``, ``image``, ``document`` or null, by extension."""
    extension = pc.utf8_lower(pc.struct_field(pc.extract_regex(uris, r"\.(?P<ext>[A-Za-z0-9]{1,5})$"), "ext"))
    kinds = pa.array([kind for kind, extensions in _EXTENSIONS.items() for _ in extensions])
    place = pc.index_in(extension, value_set=pa.array([name for names in _EXTENSIONS.values() for name in names]))
    return pa.chunked_array([kinds.take(place.combine_chunks())])


def kind_of(uri: str) -> MediaKind | None:
    """Return the kind of one address, as `kinds_of` does of a column."""
    kind: MediaKind | None = kinds_of(pa.chunked_array([[uri]]))[0].as_py()
    return kind


def join_relative(uris: pa.ChunkedArray, base: str) -> pa.ChunkedArray:
    """Put addresses without a scheme and without a leading slash below ``base``, and remove ``file://``."""
    absolute = pc.or_(pc.match_substring_regex(uris, _SCHEME), pc.starts_with(uris, "/"))
    below = pc.binary_join_element_wise(base.rstrip("/"), uris, "/")
    return pc.replace_substring_regex(pc.if_else(absolute, uris, below), r"^file:///", "/")


def refuse_unsafe(uris: pa.ChunkedArray, counts: Sequence[int], roots: Sequence[str], refuse: Refuse) -> None:
    """Refuse the rows whose address is not on the positive list or, if local, not below one of the roots.

    Only names are compared; links are resolved when the file is opened.
    """
    local = pc.starts_with(uris, "/")
    good = pc.match_substring_regex(uris, OBJECT_URI_PATTERN)
    for root in roots:
        good = pc.or_(good, pc.starts_with(uris, root.rstrip("/") + "/"))
    good = pc.and_(good, pc.invert(pc.match_substring_regex(uris, FORBIDDEN_PATTERN)))
    bad = [n for n, ok in enumerate(good.to_pylist()) if not ok] if not pc.all(good).as_py() else []
    if not bad:
        return
    rows = np.repeat(np.arange(len(counts)), counts)[bad].tolist()
    first = uris[bad[0]].as_py() or ""
    refuse(sorted(set(rows)), _why(first, local[bad[0]].as_py(), roots))


def _why(uri: str, local: bool, roots: Sequence[str]) -> str:
    try:
        check_uri(uri)
    except ItemError as error:
        return str(error)
    allowed = ", ".join(os.path.abspath(r) for r in roots) or "none, since input and manifest are in an object store"
    where = "a local path outside the allowed folders" if local else "an address that is not allowed"
    return f"{where}: {printable(uri)}; set input.uri to the folder that holds the media (now allowed: {allowed})"


def row_kinds(kinds: Sequence[str | None], counts: Sequence[int]) -> list[str | None]:
    """Return the kind of each row from the kinds of its objects, ``counts`` being objects per row."""
    rows: list[str | None] = []
    start = 0
    for count in counts:
        of_row = kinds[start : start + count]
        start += count
        same = of_row[0] if len(set(of_row)) == 1 else None
        rows.append("images" if same == "image" and count > 1 else same)
    return rows


def refuse_duplicates(ids: pa.ChunkedArray, refuse: Refuse) -> None:
    """Refuse ids that occur more than once, naming all their rows."""
    counted = pc.value_counts(ids)
    repeated = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")
    if not len(repeated):
        return
    first = repeated[0].as_py()
    rows = np.flatnonzero(pc.equal(ids, first).combine_chunks().to_numpy(zero_copy_only=False)).tolist()
    others = f" (and {len(repeated) - 1} more ids)" if len(repeated) > 1 else ""
    refuse(rows, f"the same item id {printable(first)!r}{others}; ids, or media and question, must differ")


def hash_ids(uris: Iterable, sizes: Iterable, etags: Iterable, questions: Iterable[str]) -> pa.ChunkedArray:
    """Make each row's id of its addresses, sizes, entity tags and question; the shortest argument ends the rows."""
    sha256 = hashlib.sha256
    rows = zip(uris, sizes, etags, questions, strict=False)
    ids = [sha256(f"{uri}\x1e{size}\x1e{etag}\x1e{text}".encode()).hexdigest()[:24] for uri, size, etag, text in rows]
    return pa.chunked_array([pa.array(ids, pa.string())])


def as_lists(column: pa.ChunkedArray, counts: Sequence[int] | None = None) -> pa.ChunkedArray:
    """Cut a column into lists of these lengths; of one each where none are given."""
    flat = column.combine_chunks()
    offsets = accumulate([1] * len(flat) if counts is None else counts, initial=0)
    return pa.chunked_array([pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)])


def as_json(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Write each list of texts as a JSON array."""
    return pa.chunked_array([pa.array([json_text(value) for value in column.to_pylist()], pa.string())])

"""Lists a prefix as columns of items, and counts what is left out and why: by its extension, or by the pattern."""

from __future__ import annotations

import os
from collections import Counter
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.inputs.columns import as_lists, hash_ids, kinds_of
from pipeline.inputs.input_counts import InputCounts, say_left_out
from pipeline.phases import phase
from pipeline.storage import storage
from pipeline.storage.uris import printable

NO_EXTENSION = "no extension"


def list_items(uri: str, pattern: str) -> tuple[dict[str, Any], InputCounts]:
    """Return the columns of the media below a prefix, and what the prefix holds.

    A name that is not UTF-8 is listed with its bytes as ``\\xNN``: no such address can be read, so that it becomes one
    failed row.

    Raises:
        InputError: there is no medium.
        StorageError: the prefix cannot be listed.
    """
    if storage.is_local(uri) and not os.path.exists(storage.local_path(uri)):
        raise InputError(
            f"input.uri: there is no folder {printable(storage.local_path(uri))}; relative paths begin at the working "
            f"directory, {os.getcwd()}"
        )
    with phase(f"listing {printable(uri)}"):
        found, others, num_other_case = storage.list_split(uri, pattern)
    outside = _by_extension([info.uri for info in others], lower=False)
    names = [os.fsencode(info.uri).decode("utf-8", "backslashreplace") for info in found]
    uris = pa.chunked_array([pa.array(names, pa.string())])
    kinds = kinds_of(uris)
    known = pc.is_valid(kinds)
    left_out = _by_extension(uris.filter(pc.invert(known)).to_pylist())
    if sum(left_out.values()) == len(found):
        seen = f"none of {say_left_out(left_out)} has a known media extension" if found else "no objects"
        seen += f"; {say_left_out(outside)} lie outside the pattern" if outside else ""
        seen += f", {num_other_case:,} by upper and lower case alone" if num_other_case else ""
        raise InputError(f"input {uri} with pattern {printable(pattern)!r}: {seen}; check input.uri and input.pattern")
    sizes = pa.chunked_array([pa.array([info.size for info in found], pa.int64())])
    etags = pa.chunked_array([pa.array([info.etag for info in found], pa.string())])
    uris, kinds, sizes, etags = (column.filter(known) for column in (uris, kinds, sizes, etags))
    columns = {
        "item_id": hash_ids(uris.to_pylist(), sizes.to_pylist(), etags.to_pylist(), repeat("")),
        "uris": as_lists(uris),
        "media_kind": kinds,
        "sizes": as_lists(sizes),
        "etags": as_lists(etags),
    }
    counts = InputCounts(
        len(found) + len(others),
        len(columns["item_id"]),
        left_out=left_out,
        outside_pattern=outside,
        num_other_case=num_other_case,
    )
    return columns, counts


def _by_extension(uris: list[str], *, lower: bool = True) -> dict[str, int]:
    extensions = (os.path.splitext(uri.rpartition("/")[2])[1] for uri in uris)
    extensions = (one.lower() if lower else one for one in extensions)
    return dict(Counter(printable(extension, 20) or NO_EXTENSION for extension in extensions))

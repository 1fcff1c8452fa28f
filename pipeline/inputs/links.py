"""Counts the symbolic links among a job's local media, and those that lead out of the folders that may be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import pyarrow.compute as pc

from pipeline.inputs.manifest import Manifest
from pipeline.storage.uris import is_below

MOST = 100_000  # objects that are looked at


@dataclass(frozen=True, slots=True)
class Links:
    """Counts links.

    Attributes:
        num_files: objects that are links.
        num_outside: objects whose own place, links resolved, is outside the allowed folders.
        targets: the folder that holds the places of all these; "" where there are none.
        num_not_followed: links below the listed folder that lead to folders or nowhere, and are left out.
    """

    num_files: int
    num_outside: int
    targets: str
    num_not_followed: int


def count_links(manifest: Manifest, allowed_roots: Sequence[str], *, listed: str | None) -> Links:
    """Look at the first `MOST` local objects of a manifest, and at the folder that was listed, where there is one."""
    uris = (uri for chunk in manifest.table["uris"].chunks for uri in pc.list_flatten(chunk).to_pylist())
    num_files, outside = 0, []
    for path in islice((uri for uri in uris if uri.startswith("/")), MOST):
        num_files += os.path.islink(path)
        if not is_below(path, allowed_roots):
            outside.append(os.path.realpath(path))
    targets = os.path.commonpath([os.path.dirname(path) for path in outside]) if outside else ""
    return Links(num_files, len(outside), targets, _num_not_followed(listed) if listed else 0)


def _num_not_followed(root: str) -> int:
    count, pending = 0, [root]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.is_symlink() and not entry.is_file():
                        count += 1
        except NotADirectoryError:
            continue
    return count

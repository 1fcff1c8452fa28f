"""Keeps a part of an object in a local file as large as the object (`SparseCopy`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.loading.video_index.gop_ranges import merge_ranges
from pipeline.storage import storage


@dataclass(slots=True)
class SparseCopy:
    """Holds some byte ranges of one version of an object.

    Attributes:
        path: path of the local file.
        uri, size, etag: identify the version of the object.
        present: half-open ranges that were fetched; ascending, and neither touching nor overlapping.
    """

    path: str
    uri: str
    size: int
    etag: str
    present: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        with open(self.path, "xb") as file:
            os.truncate(file.fileno(), self.size)

    @property
    def num_bytes(self) -> int:
        """Number of bytes that were fetched."""
        return sum(end - start for start, end in self.present)

    def missing(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the parts of these ranges that were not fetched yet."""
        result = []
        for start, end in merge_ranges(ranges):
            place = start
            for have_start, have_end in self.present:
                if place < have_end and have_start < end:
                    result.append((place, have_start))
                    place = have_end
            result.append((place, end))
        return [(start, end) for start, end in result if start < end]

    def fetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch these ranges from the store.

        Raises:
            ItemError: ``changed_object`` where the store holds another version by now; or as `storage.read_ranges`.
        """
        found = storage.read_ranges(self.uri, ranges, size=self.size, etag=self.etag)
        with open(self.path, "r+b") as file:
            for data, (start, _) in zip(found, ranges, strict=True):
                file.seek(start)
                file.write(data)
        self.present = merge_ranges([*self.present, *ranges])

    def read(self, start: int, end: int) -> bytes:
        """Return bytes that were fetched."""
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)

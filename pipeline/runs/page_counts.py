"""Counts the pages of documents: read, failed by type, and left out since the document has too many (`PageCounts`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(slots=True)
class PageCounts:
    """Sums over the pages of rows.

    Attributes:
        num_read: pages with an answer.
        num_left_out: pages over ``media.max_pages`` or ``media.max_images``, of which rows have no entry.
        by_error_type: number of failed pages of each type.
    """

    num_read: int = 0
    num_left_out: int = 0
    by_error_type: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, counts: Mapping[str, Any]) -> Self:
        """Return what `as_dict` was made of; of an empty mapping, no pages."""
        return cls(counts.get("read", 0), counts.get("left_out", 0), Counter(counts.get("by_error_type", {})))

    def add(self, pages: Sequence[Mapping[str, Any]] | None, num_pages: int | None) -> None:
        """Count one row by its columns ``pages`` and ``num_pages``; either may be None."""
        for page in pages or ():
            if page["status"] == "failed":
                self.by_error_type[page["error_type"]] += 1
            else:
                self.num_read += 1
        if pages is not None and num_pages is not None:
            self.num_left_out += num_pages - len(pages)

    def add_table(self, table: Any) -> None:
        """Count the rows of a part, a pyarrow table, by the same columns; no page's text becomes a Python object."""
        pages = table["pages"].combine_chunks()
        if pages.null_count == len(pages):
            return
        found = pages.flatten()  # of a null there is nothing
        types = found.field("error_type").to_pylist()
        failed = [
            kind for kind, status in zip(types, found.field("status").to_pylist(), strict=True) if status == "failed"
        ]
        self.by_error_type.update(failed)
        self.num_read += len(found) - len(failed)
        counts = zip(table["num_pages"].to_pylist(), pages.value_lengths().to_pylist(), strict=True)
        self.num_left_out += sum(total - read for total, read in counts if None not in (total, read))

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON types; empty where there are no pages."""
        if not self.num_read and not self.by_error_type and not self.num_left_out:
            return {}
        types = dict(sorted(self.by_error_type.items()))
        num_failed = self.by_error_type.total()
        return {"read": self.num_read, "failed": num_failed, "left_out": self.num_left_out, "by_error_type": types}

    def __str__(self) -> str:
        """Say it in half a line, such as ``597 read, 3 failed (3 not_found)``, and how many were left out."""
        if not self.as_dict():
            return ""
        parts = [f"{self.num_read:,} read"]
        if self.by_error_type:
            ordered = sorted(self.by_error_type.items(), key=lambda found: (-found[1], found[0]))
            types = ", ".join(f"{count:,} {name}" for name, count in ordered)
            parts.append(f"{self.by_error_type.total():,} failed ({types})")
        if self.num_left_out:
            parts.append(f"{self.num_left_out:,} over media.max_pages or max_images left out")
        return ", ".join(parts)

"""Accounts for all that an input holds, in one sum: what becomes an item, and what does not, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class InputCounts:
    """Counts the objects of a listing, or the rows of a manifest, when the input was read.

    Attributes:
        num_listed: all of them.
        num_items: items of the run.
        num_done: done by earlier runs (``input.exclude_runs``).
        num_failing: failed in earlier runs by what the file itself is, and unchanged since; ``illava retry`` tries them.
        num_over_limit: behind the first ``input.limit``.
        left_out: of no known media extension, by extension.
        outside_pattern: known media that ``input.pattern`` does not match, and other objects, by extension as written.
        num_other_case: of these, those that the pattern would match if upper and lower case were the same.
    """

    num_listed: int
    num_items: int
    num_done: int = 0
    num_failing: int = 0
    num_over_limit: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    outside_pattern: Mapping[str, int] = field(default_factory=dict)
    num_other_case: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON types."""
        return asdict(self)

    def terms(self) -> list[tuple[int, str]]:
        """Return the terms that sum to `num_listed`, each with its words; those of zero are left out."""
        left_out, outside = sum(self.left_out.values()), sum(self.outside_pattern.values())
        terms = [
            (self.num_done, "done by earlier runs"),
            (self.num_failing, "failed in earlier runs and are unchanged (`illava retry RUN` tries them)"),
            (self.num_over_limit, "over input.limit"),
            (left_out, f"of no known media extension ({_by_extension(self.left_out)})"),
            (outside, f"outside input.pattern ({_by_extension(self.outside_pattern)})"),
        ]
        return [(self.num_items, "items"), *((count, words) for count, words in terms if count)]

    def lines(self) -> list[str]:
        """Say the sum in one line, and what to do where the pattern's case keeps objects out in a second one."""
        said = " + ".join(f"{count:,} {words}" for count, words in self.terms())
        lines = [f"{self.num_listed:,} in the input = {said}"]
        if self.num_other_case:
            lines.append(
                f"{self.num_other_case:,} of them lie outside input.pattern by upper and lower case alone: "
                "a pattern such as **/*.[mM][pP]4 takes both"
            )
        return lines


def say_left_out(left_out: Mapping[str, int], limit: int = 8) -> str:
    """Name how many files were left out, by extension, such as ``12 files (9 .heic, 3 no extension)``."""
    total = sum(left_out.values())
    return f"{total:,} file{'s' * (total != 1)} ({_by_extension(left_out, limit)})"


def _by_extension(counts: Mapping[str, int], limit: int = 8) -> str:
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    named = [f"{count:,} {extension}" for extension, count in ordered[:limit]]
    if ordered[limit:]:
        named.append(f"{sum(count for _, count in ordered[limit:]):,} others")
    return ", ".join(named)

"""Says in one form what a reduction leaves of the visual tokens.

Patches in -> out of the tower, tokens into the LLM -> its last layer, and one headline share. That is the retention
ratio: visual tokens in the LLM's last layer, of those that the unreduced model has there. Dry run, progress, summary,
status and report take their words from here. Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

_COUNTS = ("num_patches", "num_patches_kept", "num_vision_tokens", "num_vision_tokens_kept", "num_decoder_tokens_kept")


@dataclass(frozen=True, slots=True)
class Retention:
    """Counts the visual tokens of one item, or of several added up; named as the row's columns.

    Attributes:
        num_patches: tokens entering the vision tower.
        num_patches_kept: tokens leaving it; None where rows of an earlier version do not say.
        num_vision_tokens: visual tokens the unreduced model would give its LLM.
        num_vision_tokens_kept: visual tokens entering the LLM.
        num_decoder_tokens_kept: visual tokens in its last layer.
        exact: False where kept counts are upper bounds.
    """

    num_patches: int
    num_patches_kept: int | None
    num_vision_tokens: int
    num_vision_tokens_kept: int
    num_decoder_tokens_kept: int
    exact: bool = True

    @classmethod
    def of(cls, counts: Any, *, num_items: int = 1) -> Self:
        """Take the counts of a row, of token counts or of a mapping; of several items by their mean, rounded down."""
        mapping = counts if isinstance(counts, Mapping) else {name: getattr(counts, name) for name in _COUNTS}
        found = {name: mapping.get(name) for name in _COUNTS}
        means = {name: None if count is None else int(count) // num_items for name, count in found.items()}
        known: dict[str, Any] = means | {name: means[name] or 0 for name in _COUNTS if name != "num_patches_kept"}
        return cls(**known, exact=getattr(counts, "exact", True))

    @property
    def ratio(self) -> float | None:
        """The retention ratio; None where there are no visual tokens."""
        return retention_ratio(self.num_decoder_tokens_kept, self.num_vision_tokens)

    @property
    def brief(self) -> str:
        """The counts in half a line, such as ``patches 1,568 -> 800, tokens 393 -> 60, kept 15.3%``."""
        most, kept = self._most, "-" if self.ratio is None else f"{self.ratio:.1%}"
        return (
            f"patches {self._tower}, tokens {most}{self.num_vision_tokens_kept:,} -> "
            f"{most}{self.num_decoder_tokens_kept:,}, kept {most}{kept}"
        )

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The counts in full: label and text of each line; nothing where there are no visual tokens."""
        if self.ratio is None:
            return []
        most, first, last = self._most, self.num_vision_tokens_kept, self.num_decoder_tokens_kept
        out = " out of the tower" if self.num_patches_kept is not None else " into the tower"
        return [
            ("patches", f"{self._tower}{out}"),
            ("tokens", f"{most}{first:,} into the LLM -> {most}{last:,} in its last layer"),
            ("kept", f"{most}{self.ratio:.1%} of the {self.num_vision_tokens:,} tokens the unreduced model has there"),
        ]

    @property
    def _most(self) -> str:
        return "" if self.exact else "at most "

    @property
    def _tower(self) -> str:
        after = "" if self.num_patches_kept is None else f" -> {self._most}{self.num_patches_kept:,}"
        return f"{self.num_patches:,}{after}"


def retention_ratio(num_decoder_tokens_kept: int, num_vision_tokens: int) -> float | None:
    """Return the share of the unreduced model's visual tokens in the LLM's last layer; None where there are none."""
    return num_decoder_tokens_kept / num_vision_tokens if num_vision_tokens else None

"""Keeps a few failed items for people to read (`FailureExamples`), names the command that helps with failures, and
decides when there are too many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.inputs.permanent_failures import PERMANENT
from pipeline.records import ROW_ERROR_TYPES, ResultRow

MAX_EXAMPLES = 5
FAILURES_EXIT_CODE = 7

# What `illava retry` needs beside the type, where trying again as before would not help.
_WITH_MORE = {
    "unsafe_uri": "--set input.follow_links=FOLDER",
    "load_timeout": "--set media.load_timeout_s=600",
    "out_of_memory": "--set model.max_batch_requests=1",
    "cache_too_small": "--set model.kv_cache_bytes=20_000_000_000",
    "item_timeout": "--set runtime.item_timeout_s=7200",
}
# Neither the bytes nor the machine: the same configuration gives the same failure.
_NEW_RUN = frozenset(
    {
        "changed_object",
        "too_large",
        "load_out_of_memory",
        "prompt_too_long",
        "numerical_error",
        "invalid_answer",
        "reduction_did_not_fire",
    }
)
_RETRIED = frozenset(ROW_ERROR_TYPES) - PERMANENT - _NEW_RUN


@dataclass(frozen=True, slots=True)
class FailedItem:
    """Names one failed item: its media's address, or its id where it has several, and why it failed."""

    name: str
    error_type: str
    message: str


@dataclass(slots=True)
class FailureExamples:
    """Keeps the first failed items, of as many error types as there are places."""

    _found: list[FailedItem] = field(default_factory=list)

    def add(self, row: ResultRow) -> None:
        """Take a failed row, if there is a place, or if its type is new and another's second can go."""
        name = row.uri if len(row.uris) == 1 else row.item_id
        failed = FailedItem(name, row.error_type or "", row.error_message or "")
        types = [one.error_type for one in self._found]
        if len(types) == MAX_EXAMPLES:
            second = [place for place, one in enumerate(types) if one in types[:place]]
            if failed.error_type in types or not second:
                return
            del self._found[second[-1]]
        self._found.append(failed)

    @property
    def items(self) -> tuple[FailedItem, ...]:
        """The failed items, in the order in which they failed."""
        return tuple(self._found)


def command_for(error_types: Mapping[str, int], run_uri: str) -> str:
    """Return what to do about a finished run's failed rows: the command that helps most of those that it can help."""
    again = [name for name in sorted(error_types, key=lambda name: (-error_types[name], name)) if name in _RETRIED]
    if again and again[0] in _WITH_MORE:
        return f"illava retry {run_uri} --only {again[0]} {_WITH_MORE[again[0]]}"
    if again:
        return f"illava retry {run_uri} --only {','.join(name for name in again if name not in _WITH_MORE)}"
    if "encrypted_document" in error_types:
        how = "give the PDFs' passwords in the manifest's column `password` or in ILLAVA_PDF_PASSWORD"
        return f"{how}, then illava retry {run_uri} --only encrypted_document"
    if set(error_types) <= PERMANENT:
        return f"mend or leave out these files (illava report {run_uri} shows them all); what is mended runs anew"
    return f"illava report {run_uri} shows all of them; a new run under other keys may do better (docs/errors.md)"


def failed_too_often(max_failed: int | float | None, num_failed: int, num_items: int) -> bool:
    """Whether more items failed than are allowed.

    Args:
        max_failed: a count (int), a share below 1 of all items (float), or None for no limit.
        num_failed: items that failed.
        num_items: items of the run. A share is of these, not of those done so far: a few failures at the beginning
            end no run that could still stay below it.
    """
    if max_failed is None:
        return False
    return num_failed > (max_failed if isinstance(max_failed, int) else max_failed * num_items)

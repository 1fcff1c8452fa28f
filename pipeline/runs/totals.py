"""Sums over the parts of a run: rows by status, failures by type, tokens, seconds and cost; writes nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pipeline.errors import ItemError, StorageError
from pipeline.records import LATER_COLUMNS, UNANSWERED
from pipeline.runs.page_counts import PageCounts
from pipeline.runs.parquet_sink import read_parts
from pipeline.runs.run_folder import FINISHED_FILE
from pipeline.storage import storage

_COUNTED = ["status", "error_type", "finish_reason"]
_SUMMED = (
    "bytes_fetched",
    "num_patches",
    "num_patches_kept",
    "num_vision_tokens",
    "num_vision_tokens_kept",
    "num_decoder_tokens_kept",
    "num_generated_tokens",
    "cpu_s",
    "gpu_s",
    "cost_usd",
)
_LATER = tuple(name for name in _SUMMED if name in LATER_COLUMNS)


@dataclass(frozen=True, slots=True)
class Totals:
    """Holds sums over rows.

    Attributes:
        num_rows: rows of all parts.
        by_status: number of rows of each status.
        by_error_type: number of failed rows of each type.
        by_finish_reason: number of answered rows whose answer ended so.
        sums: sums of the columns that can be summed; without a later column that any of the rows lacks.
        pages: `pipeline.runs.page_counts.PageCounts` as a mapping; empty of a run without documents.
        num_empty: answered rows without a text, or with white space alone; None where an earlier version did not count.
    """

    num_rows: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    by_error_type: dict[str, int] = field(default_factory=dict)
    by_finish_reason: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    num_empty: int | None = None
    pages: dict[str, Any] = field(default_factory=dict)

    @property
    def num_answered(self) -> int:
        """Rows with an answer."""
        return self.num_rows - sum(self.by_status.get(status, 0) for status in UNANSWERED)

    def as_dict(self) -> dict[str, Any]:
        """Return the totals as JSON types."""
        return asdict(self)


def run_totals(run_uri: str, indexes: Sequence[int]) -> Totals:
    """Sum over the parts of these shards.

    Raises:
        ItemError, StorageError: a part is absent or cannot be read.
    """
    groups: list[dict[str, Any]] = []
    num_empty, pages = 0, PageCounts()
    for table in read_parts(run_uri, indexes, [*_COUNTED, *_SUMMED, "text", "pages", "num_pages"]):
        pages.add_table(table)
        answered = zip(table["status"].to_pylist(), table["text"].to_pylist(), strict=True)
        num_empty += sum(status not in UNANSWERED and not text.strip() for status, text in answered)
        summed = [([], "count_all"), *((name, "sum") for name in _SUMMED), *((name, "count") for name in _LATER)]
        # In the calling thread, as `pipeline.storage.parquet` reads.
        groups += table.group_by(_COUNTED, use_threads=False).aggregate(summed).to_pylist()
    counts = {name: Counter[str]() for name in _COUNTED}
    for group in groups:
        for name, counter in counts.items():
            if group[name] is not None:
                counter[group[name]] += group["count_all"]
    status, errors, reasons = (dict(sorted(counter.items())) for counter in counts.values())
    sums: dict[str, float] = {}
    for name in _SUMMED:
        if name in _LATER and any(group[f"{name}_count"] < group["count_all"] for group in groups):
            continue  # of rows that do not all say it there is no sum
        values = [group[f"{name}_sum"] or 0 for group in groups]  # null where no row has a value
        sums[name] = math.fsum(values) if name.endswith(("_s", "_usd")) else sum(values)
    return Totals(sum(status.values()), status, errors, reasons, sums, num_empty, pages.as_dict())


def recorded_totals(run_uri: str) -> Totals:
    """Return the totals that ``_RUN.json`` has of a finished run.

    Raises:
        StorageError: it cannot be read, or has none.
    """
    uri = storage.join(run_uri, FINISHED_FILE)
    try:
        totals = json.loads(storage.read(uri))["totals"]
        return Totals(**{one.name: totals[one.name] for one in fields(Totals) if one.name in totals})
    except (ItemError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{uri} cannot be read: {error}; `illava verify {run_uri}` says more") from error

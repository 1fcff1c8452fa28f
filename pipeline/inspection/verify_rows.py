"""Checks a row, and a part's rows, against the items they belong to: pure functions on plain dicts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from illava.requests import FinishReason
from pipeline.records import ROW_ERROR_TYPES, UNANSWERED, MediaItem, RowStatus
from pipeline.retention import retention_ratio

STAGES = ("fetch_s", "load_s", "preprocess_s", "queue_s", "vision_s", "prefill_s", "decode_s")
# The machine may give the core to another process for about so long between two readings of the clock.
STAGE_SLACK_S = 0.010
_ROUNDING = 1e-5  # of float32 logarithms and sums
_YES_NO = ("yes", "no")  # what metrics of that kind tell of, whatever the row's options
_SECONDS = (*STAGES, "model_wait_s", "latency_s", "cpu_s", "gpu_s")
_COUNTS = (
    "num_frames",
    "bytes_fetched",
    "num_patches",
    "num_patches_kept",
    "num_vision_tokens",
    "num_vision_tokens_kept",
    "num_decoder_tokens_kept",
    "num_prompt_tokens",
    "num_generated_tokens",
)
_ERASED = ("text", "candidates", "drafts", "answer", "score", "pages", "fields", "error_type", "error_message")
_PAGE_COUNTS = ("num_vision_tokens", "num_vision_tokens_kept", "num_decoder_tokens_kept", "num_generated_tokens")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Violation:
    """Describes one invariant that does not hold.

    Attributes:
        kind: name of the invariant.
        where: object, shard or row.
        message: what was found and what was expected.
    """

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.message}"


def check_ids(where: str, expected: Sequence[str], found: Sequence[str]) -> Iterator[Violation]:
    """Check that each item of the shard has one row, in manifest order."""
    counts = Counter(found)
    missing = [item_id for item_id in expected if item_id not in counts]
    foreign = sorted(counts.keys() - set(expected))
    doubled = [item_id for item_id, count in counts.items() if count > 1]
    for kind, ids in (("missing_row", missing), ("foreign_row", foreign), ("duplicate_row", doubled)):
        if ids:
            yield Violation(kind, where, f"{len(ids)} items, such as {ids[:3]}")
    if not (missing or foreign or doubled) and list(found) != list(expected):
        yield Violation("wrong_order", where, "the rows are not in manifest order")


def check_row(where: str, row: Row, item: MediaItem, constants: Row) -> Iterator[Violation]:
    """Check everything that must hold of one row.

    Args:
        where: names the row in messages.
        row: the row, as plain values.
        item: its item in the manifest.
        constants: columns that have one value in every row of this shard.
    """
    for name, value in constants.items():
        if row[name] != value:
            yield Violation("foreign_value", where, f"{name} is {row[name]!r}, this run's is {value!r}")
    for name, value in _carried(item).items():
        if _plain(row[name]) != value:
            yield Violation("differs_from_manifest", where, f"{name} is {row[name]!r}, the manifest has {value!r}")
    if item.prompt is not None and item.prompt not in row["prompt"]:  # a task may put words around it
        yield Violation(
            "differs_from_manifest", where, f"prompt is {row['prompt']!r}, the manifest has {item.prompt!r}"
        )
    for kind, problem in _ROW_CHECKS:
        if text := problem(row):
            yield Violation(kind, where, text)


def stages_fit_latency(row: Row) -> bool:
    """Whether the stage seconds sum to the latency within 2 %, or within `STAGE_SLACK_S` where that is more."""
    total = math.fsum(row[name] or 0.0 for name in STAGES)
    return abs(total - row["latency_s"]) <= max(0.02 * row["latency_s"], STAGE_SLACK_S)


def _carried(item: MediaItem) -> Row:
    return {
        "uri": item.uris[0],
        "uris": list(item.uris),
        "media_kind": item.media_kind,
        "question_id": item.question_id,
        "options": None if item.options is None else list(item.options),
        "reference": item.reference,
        "category": item.category,
        "fields": sorted(item.fields.items()),
    }


def _plain(value: Any) -> Any:
    return sorted(value) if value and isinstance(value, list) and isinstance(value[0], tuple) else value


def _status_problem(row: Row) -> str | None:
    status, error_type = row["status"], row["error_type"]
    if status not in get_args(RowStatus):
        return f"status {status!r}"
    if status == "erased":
        left = [name for name in _ERASED if row[name]]
        return f"erased, and {left[0]} is {row[left[0]]!r}" if left else None
    if status == "failed" and error_type not in ROW_ERROR_TYPES:
        return f"failed with error type {error_type!r}, which is not on the closed list"
    if status == "failed" and not row["error_message"]:
        return "failed without a message"
    if status != "failed" and error_type is not None:
        return f"status {status} with error type {error_type!r}"
    if status == "partial" and not row["error_message"]:
        return "partial without saying why"
    if status != "failed" and row["finish_reason"] not in get_args(FinishReason):
        return f"answered with finish reason {row['finish_reason']!r}"
    return f"attempts is {row['attempts']}" if row["attempts"] < 1 else None


def _counts_problem(row: Row) -> str | None:
    negative = [name for name in _COUNTS if (row[name] or 0) < 0]  # null: of a version without that column
    if negative:
        return f"{negative[0]} is {row[negative[0]]}"
    total, kept = row["num_vision_tokens"], row["num_vision_tokens_kept"]
    if not row["num_decoder_tokens_kept"] <= kept <= total:
        return f"kept {row['num_decoder_tokens_kept']} in the decoder of {kept} of {total} vision tokens"
    if kept > row["num_prompt_tokens"]:
        return f"{kept} kept vision tokens in a prompt of {row['num_prompt_tokens']}"
    if not math.isclose(row["kept_ratio"], kept / total if total else 0.0, abs_tol=1e-9):
        return f"kept_ratio is {row['kept_ratio']}, the counts say {kept} of {total}"
    if row["status"] not in UNANSWERED:
        nothing = [name for name in ("num_frames", "num_patches", "num_generated_tokens") if row[name] == 0]
        return f"answered with {nothing[0]} = 0" if nothing else None
    return None


def _retention_problem(row: Row) -> str | None:
    left, ratio = row["num_patches_kept"], row["retention_ratio"]
    if left is None:  # of a version without these columns
        return None
    if left > row["num_patches"]:
        return f"{left} of {row['num_patches']} patches left the tower"
    kept, total = row["num_decoder_tokens_kept"], row["num_vision_tokens"]
    expected = retention_ratio(kept, total)
    if (ratio is None) != (expected is None) or not math.isclose(ratio or 0.0, expected or 0.0, abs_tol=1e-9):
        return f"retention_ratio is {ratio}, the counts say {kept} of {total}"
    return None


def _pages_problem(row: Row) -> str | None:
    pages = row["pages"]
    if pages is None:
        return None
    if [page["page"] for page in pages] != list(range(len(pages))):
        return f"pages {[page['page'] for page in pages]}: not each once, in order"
    num_failed = 0
    for page in pages:
        failed = page["status"] == "failed"
        num_failed += failed
        if page["status"] not in {"ok", "failed"} or failed != (page["error_type"] in ROW_ERROR_TYPES):
            return f"page {page['page']} has status {page['status']!r} with error type {page['error_type']!r}"
    due = {"failed"} if num_failed == len(pages) else {"partial"} if num_failed else {"ok", "partial"}
    if row["status"] not in due:
        return f"{num_failed} of {len(pages)} pages failed and the row's status is {row['status']!r}"
    if (num_pages := row.get("num_pages")) is not None and num_pages < len(pages):  # null before schema version 3
        return f"{len(pages)} pages of a document that has {num_pages}"
    if num_pages is not None and num_pages > len(pages) and row["status"] == "ok":
        return f"{len(pages)} of {num_pages} pages were read, and the row's status is ok"
    for name in _PAGE_COUNTS:
        if (total := sum(page[name] or 0 for page in pages)) != row[name]:
            return f"{name} is {row[name]}, the pages' sum to {total}"
    return None


def _times_problem(row: Row) -> str | None:
    bad = [name for name in (*_SECONDS, "cost_usd") if not 0 <= (row.get(name) or 0.0) < math.inf]
    if bad:
        return f"{bad[0]} is {row[bad[0]]}"
    if (row.get("model_wait_s") or 0.0) > row["queue_s"] + STAGE_SLACK_S:
        return f"model_wait_s is {row['model_wait_s']}, a part of queue_s, which is {row['queue_s']}"
    stamps = row["frame_timestamps_s"]
    if stamps and (len(stamps) != row["num_frames"] or any(b < a for a, b in pairwise(stamps))):
        return f"{len(stamps)} frame timestamps for {row['num_frames']} frames, or not in order"
    return None


def _probabilities_problem(row: Row) -> str | None:
    logprob, shares = row.get("answer_logprob"), row.get("option_probabilities")  # null before schema version 3
    if logprob is not None and not -math.inf < logprob <= _ROUNDING:
        return f"answer_logprob is {logprob}; the logarithm of a probability is at most 0"
    if shares is None:
        return None
    if not all(0 <= share <= 1 + _ROUNDING for share in shares) or math.fsum(shares) > 1 + _ROUNDING:
        return f"option_probabilities are {shares}; each lies in 0 to 1, and so does their sum"
    num_options = len(row["options"] or _YES_NO)
    if len(shares) not in {num_options, len(_YES_NO)}:
        return f"{len(shares)} option_probabilities for {num_options} options"
    return None


_ROW_CHECKS: tuple[tuple[str, Callable[[Row], str | None]], ...] = (
    ("bad_status", _status_problem),
    ("bad_counts", _counts_problem),
    ("bad_counts", _retention_problem),
    ("bad_seconds", _times_problem),
    ("bad_pages", _pages_problem),
    ("bad_probabilities", _probabilities_problem),
)

"""Tells how far a run has come, from its folder alone (`run_status`); writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.inputs.input_counts import InputCounts
from pipeline.runs.parquet_sink import list_parts
from pipeline.runs.run import done_shards
from pipeline.runs.run_folder import is_finished
from pipeline.runs.run_record import read_run_file, wanted_attempts
from pipeline.runs.totals import Totals, run_totals
from pipeline.storage import storage


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Holds the state of a run at one moment.

    Attributes:
        uri: the run folder.
        finished: whether ``_RUN.json`` exists.
        num_items: items of the frozen manifest.
        num_shards: shards of the run.
        num_shards_done: published parts, without those that a retry has yet to compute again.
        attempt: 1, raised by each retry.
        created_at: when the run was created, ISO 8601 in UTC.
        totals: sums over the published parts.
        counts: what the input held when the run began; None where an earlier version did not count it.
    """

    uri: str
    finished: bool
    num_items: int
    num_shards: int
    num_shards_done: int
    attempt: int
    created_at: str
    totals: Totals = field(default_factory=Totals)
    counts: InputCounts | None = None


def run_status(uri: str) -> RunStatus:
    """Read a run's state.

    Raises:
        RefusedError: the folder holds no run.
        StorageError: a part cannot be read; ``verify`` names the part.
    """
    uri = storage.folder_uri(uri)
    record = read_run_file(uri)
    published = [index for index in list_parts(uri) if index < record["num_shards"]]
    done = [index for index in done_shards(uri, wanted_attempts(record)) if index < record["num_shards"]]
    return RunStatus(
        uri=uri,
        finished=is_finished(uri),
        num_items=record["num_items"],
        num_shards=record["num_shards"],
        num_shards_done=len(done),
        attempt=record["attempt"],
        created_at=record.get("created_at", ""),
        totals=run_totals(uri, published),
        counts=_counts(record),
    )


def _counts(record: Mapping[str, Any]) -> InputCounts | None:
    if record.get("input"):
        return InputCounts(**record["input"])
    left_out = record.get("left_out")
    if left_out is None:
        return None
    return InputCounts(record["num_items"] + sum(left_out.values()), record["num_items"], left_out=left_out)


def render_status(status: RunStatus) -> str:
    """Render a run's state in a few lines for a terminal."""
    totals = status.totals
    state = "finished" if status.finished else "unfinished; the same command resumes"
    rows = ", ".join(f"{count} {name}" for name, count in totals.by_status.items()) or "none yet"
    lines = [
        f"{status.uri}: {state}",
        f"  shards   {status.num_shards_done} of {status.num_shards}",
        f"  rows     {totals.num_rows} of {status.num_items}: {rows}",
    ]
    if totals.by_error_type:
        lines.append("  failures " + ", ".join(f"{count} {name}" for name, count in totals.by_error_type.items()))
    if status.counts and len(status.counts.terms()) > 1:
        lines += [f"  input    {text}" for text in status.counts.lines()]
    kept, total = totals.sums.get("num_vision_tokens_kept", 0), totals.sums.get("num_vision_tokens", 0)
    if total:
        lines.append(f"  tokens   {kept:.0f} of {total:.0f} vision tokens kept ({kept / total:.1%})")
    if status.attempt > 1:
        lines.append(f"  attempt  {status.attempt}")
    return "\n".join(lines)

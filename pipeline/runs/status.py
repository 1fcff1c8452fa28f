"""Tells how far a run has come, from its folder alone (`run_status`); writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.inputs.manifest import say_left_out
from pipeline.retention import Retention
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
        left_out: listed files that are no items, by extension.
    """

    uri: str
    finished: bool
    num_items: int
    num_shards: int
    num_shards_done: int
    attempt: int
    created_at: str
    totals: Totals = field(default_factory=Totals)
    left_out: Mapping[str, int] = field(default_factory=dict)


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
        left_out=record.get("left_out") or {},
    )


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
    if status.left_out:
        lines.append(f"  left out {say_left_out(status.left_out)}: no known media extension")
    lines += [f"  {label:<8} {text}" for label, text in Retention.of(totals.sums).lines]
    if status.attempt > 1:
        lines.append(f"  attempt  {status.attempt}")
    return "\n".join(lines)

"""Tells how far a run, or each run of a folder, has come, from its folder alone; writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.cost import Spending
from pipeline.errors import RefusedError
from pipeline.inputs.input_counts import InputCounts
from pipeline.retention import Retention
from pipeline.runs.accepted import Difference, read_accepted
from pipeline.runs.earlier_runs import list_runs
from pipeline.runs.heartbeat import Beat, Observer, watch
from pipeline.runs.page_counts import PageCounts
from pipeline.runs.parquet_sink import list_parts
from pipeline.runs.run import done_shards
from pipeline.runs.run_folder import is_finished
from pipeline.runs.run_record import read_run_file, wanted_attempts
from pipeline.runs.sessions import run_rate, run_spending
from pipeline.runs.totals import Totals, recorded_totals, run_totals
from pipeline.storage import storage

_COMMANDS = {"caption": "caption", "question": "answer", "document": "documents"}


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
        command: the ``illava`` command that made it.
        at_work: sessions that were seen to be at work.
        silent: sessions that have left a sign of life and show no second one.
        rate: rows a second: of the sessions at work, or of those that have ended; None where it is not known.
        spent: what the sessions that have ended spent.
        num_sessions: sessions in all.
        num_unknown: sessions that have not recorded what they spent: killed, or at work.
        priced: whether the run's configuration sets prices.
        accepted: differences that ``--accept`` took.
        nights_uri: ``input.exclude_runs`` of its configuration.
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
    command: str = "caption"
    at_work: tuple[Beat, ...] = ()
    silent: tuple[Beat, ...] = ()
    rate: float | None = None
    spent: Spending = field(default_factory=Spending)
    num_sessions: int = 0
    num_unknown: int = 0
    priced: bool = False
    accepted: tuple[Difference, ...] = ()
    nights_uri: str | None = None

    @property
    def num_left(self) -> int:
        """Items that the sessions at work have no row of; where none is, items without a published row."""
        unpublished = sum(
            beat.progress.get("num_planned", 0) - beat.progress.get("num_rows", 0) for beat in self.at_work
        )
        return unpublished if self.at_work else self.num_items - self.totals.num_rows

    @property
    def cost_usd(self) -> float:
        """Cost of the sessions that have ended, and of the rows of those at work."""
        return self.spent.total_usd + sum(beat.progress.get("items_usd", 0.0) for beat in self.at_work)


def run_status(uri: str) -> RunStatus:
    """Read a run's state; where a session has not ended, look for a few seconds whether it is at work.

    Raises:
        RefusedError: the folder holds no run.
        StorageError: a part cannot be read; ``verify`` names the part.
    """
    uri = storage.folder_uri(uri)
    record = read_run_file(uri)
    return _status(uri, record, finished := is_finished(uri), None if finished else _observed([uri])[uri])


def runs_status(uri: str) -> list[RunStatus]:
    """Read the state of every run that lies directly in a folder, the oldest first.

    Raises:
        RefusedError: the folder holds no run.
        StorageError: as `run_status`.
    """
    uri = storage.folder_uri(uri)
    runs = list_runs(uri)
    if not runs:
        raise RefusedError(
            f"{uri} holds no run, neither itself nor one folder deeper (no run.json): give a job's output.uri, or the "
            "folder in which several lie"
        )
    records = {run: read_run_file(run) for run in runs}
    finished = {run: is_finished(run) for run in runs}
    observers = _observed([run for run in runs if not finished[run]])
    ordered = sorted(runs, key=lambda run: (records[run].get("created_at", ""), run))
    return [_status(run, records[run], finished[run], observers.get(run), as_recorded=len(runs) > 1) for run in ordered]


def _observed(runs: Sequence[str]) -> dict[str, Observer]:
    observers = {run: Observer(run) for run in runs}
    watch(observers)
    return observers


def _status(
    uri: str, record: dict[str, Any], finished: bool, observer: Observer | None, *, as_recorded: bool = False
) -> RunStatus:
    """Read a run's state; the sums of a finished run are read from ``_RUN.json`` instead of its parts if wished so."""
    published = [index for index in list_parts(uri) if index < record["num_shards"]]
    done = [index for index in done_shards(uri, wanted_attempts(record)) if index < record["num_shards"]]
    at_work = tuple(observer.at_work) if observer else ()
    spent, num_sessions, num_unknown = run_spending(uri)
    config = record.get("config") or {}
    return RunStatus(
        uri=uri,
        finished=finished,
        num_items=record["num_items"],
        num_shards=record["num_shards"],
        num_shards_done=len(done),
        attempt=record["attempt"],
        created_at=record.get("created_at", ""),
        totals=recorded_totals(uri) if finished and as_recorded else run_totals(uri, published),
        counts=_counts(record),
        command=_COMMANDS.get((config.get("task") or {}).get("kind", ""), "caption"),
        at_work=at_work,
        silent=tuple((*observer.unknown, *observer.dead)) if observer else (),
        rate=_rate_of(at_work) or run_rate(uri),
        spent=spent,
        num_sessions=num_sessions,
        num_unknown=num_unknown,
        priced=any((config.get("prices") or {}).values()),
        accepted=tuple(read_accepted(uri)),
        nights_uri=(config.get("input") or {}).get("exclude_runs"),
    )


def _rate_of(at_work: Sequence[Beat]) -> float | None:
    rates = [beat.progress.get("num_rows", 0) / max(beat.progress.get("wall_s", 0.0), 1e-9) for beat in at_work]
    return sum(rates) or None


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
    rows = ", ".join(f"{count} {name}" for name, count in totals.by_status.items()) or "none yet"
    lines = [
        f"{status.uri}: {_state(status)}",
        f"  shards   {status.num_shards_done} of {status.num_shards}",
        f"  rows     {totals.num_rows} of {status.num_items}: {rows}",
    ]
    if totals.by_error_type:
        lines.append("  failures " + ", ".join(f"{count} {name}" for name, count in totals.by_error_type.items()))
    if pages := str(PageCounts.of(totals.pages)):
        lines.append(f"  pages    {pages}")
    if status.counts and len(status.counts.terms()) > 1:
        lines += [f"  input    {text}" for text in status.counts.lines()]
    lines += [f"  {label:<8} {text}" for label, text in Retention.of(totals.sums).lines]
    lines += [f"  at work  {beat}: {_progress(beat)}" for beat in status.at_work]
    lines += [f"  silent   {beat} has left without an end, and gives no sign of life" for beat in status.silent]
    lines.append(f"  rate     {_rate(status)}")
    lines.append(f"  cost     {_cost(status)}")
    lines += [f"  accepted {one}" for one in status.accepted]
    if status.attempt > 1:
        lines.append(f"  attempt  {status.attempt}")
    lines.append(f"  next     {_next(status)}")
    return "\n".join(lines)


def render_runs(statuses: Sequence[RunStatus]) -> str:
    """Render a line a run, and one with the totals."""
    width = max(len(one.uri) for one in statuses)
    lines = [f"{one.uri:<{width}}  {_run_line(one)}" for one in statuses]
    by_status = Counter[str]()
    for one in statuses:
        by_status.update(one.totals.by_status)
    num_rows, num_items = sum(one.totals.num_rows for one in statuses), sum(one.num_items for one in statuses)
    kinds = ", ".join(f"{by_status[kind]:,} {kind}" for kind in ("ok", "partial", "failed"))
    states = Counter("finished" if one.finished else "at work" if one.at_work else "unfinished" for one in statuses)
    runs = ", ".join(f"{count} {state}" for state, count in states.items())
    cost = f"; ${sum(one.cost_usd for one in statuses):.4f}" if any(one.priced for one in statuses) else ""
    total = f"{len(statuses)} runs ({runs}): {num_rows:,} of {num_items:,} rows ({kinds}){cost}"
    return "\n".join([*lines, total])


def _run_line(status: RunStatus) -> str:
    failed = status.totals.by_status.get("failed", 0)
    parts = [
        f"{status.created_at[:16]}  {status.totals.num_rows:,} of {status.num_items:,} rows",
        f"{failed:,} failed" if failed else "",
        f"${status.cost_usd:.4f}" if status.priced else "",
        _state(status).partition(";")[0],
        f"next: {_next(status)}" if not status.finished or failed else "",
    ]
    return ", ".join(filter(None, parts))


def _state(status: RunStatus) -> str:
    if status.finished:
        return "finished"
    if status.at_work:
        return "unfinished; a job is at work on it"
    return "unfinished; the same command resumes"


def _progress(beat: Beat) -> str:
    said = beat.progress
    return (
        f"{said.get('num_rows', 0):,} of {said.get('num_planned', 0):,} items in {_clock(said.get('wall_s', 0.0))}, "
        f"{said.get('num_in_work', 0):,} in work, {said.get('num_failed', 0):,} failed"
    )


def _rate(status: RunStatus) -> str:
    if status.rate is None:
        return "not known yet"
    said = f"{status.rate:.2f} items/s, model loading included"
    if status.finished or not status.num_left:
        return said
    left = f"{_clock(status.num_left / status.rate)} left"
    return f"{said}; {left}" if status.at_work else f"{said}; at that rate {left} once it goes on"


def _cost(status: RunStatus) -> str:
    said = f"${status.cost_usd:.4f}" if status.priced else "no prices set"
    said += f"; {status.num_sessions} session{'s' * (status.num_sessions != 1)}"
    if unknown := max(status.num_unknown - len(status.at_work), 0):
        said += f", {unknown} of unknown cost, since killed"
    return said


def _next(status: RunStatus) -> str:
    if status.at_work:
        return f"wait; then illava status {status.uri}"
    if not status.finished and status.attempt > 1:
        return f"illava retry {status.uri}"
    if not status.finished:
        return f"the job's own command again: illava {status.command} --config ..."
    if status.totals.by_status.get("failed"):
        return f"illava retry {status.uri}"
    return f"illava report {status.uri}"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"

"""Reads a run's figures from its folder alone: counts, percentiles, cost, and which items to show. Writes nothing.

Memory grows by a few numbers a row; texts are read of the shown items only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.records import UNANSWERED, ResultRow
from pipeline.report.course import Course, course_of
from pipeline.runs.parquet_sink import list_parts, part_name, read_parts, read_rows, result_rows
from pipeline.runs.run_folder import is_finished, read_finished
from pipeline.runs.run_record import read_run_file
from pipeline.runs.sessions import cost_record, session_spans
from pipeline.runs.totals import Totals, run_totals
from pipeline.storage import storage

if TYPE_CHECKING:
    from pipeline.evaluation.run_scores import RunScores

# What a stage is called -> the columns whose difference it is.
STAGES = {
    "fetch": ("fetch_s",),
    "load": ("load_s",),
    "preprocess": ("preprocess_s",),
    "model loading": ("model_wait_s",),
    "queue": ("queue_s", "model_wait_s"),
    "vision": ("vision_s",),
    "prefill": ("prefill_s",),
    "decode": ("decode_s",),
    "latency": ("latency_s",),
}
PERCENTILES = (50, 90, 99, 100)
_SECONDS = tuple(dict.fromkeys(name for names in STAGES.values() for name in names))
_NUM_EXTREME, _NUM_FAILED = 8, 20


@dataclass(frozen=True, slots=True)
class Place:
    """Says where a row stands: its shard, and its number within it."""

    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Holds the seconds of one stage over all answered rows.

    Attributes:
        name: in `STAGES`.
        percentiles: at `PERCENTILES`.
        share: of the sum of all latencies; of the latency itself 1.
    """

    name: str
    percentiles: tuple[float, ...]
    share: float


@dataclass(frozen=True, slots=True)
class RunFigures:
    """Holds what the report says of a run as a whole.

    Attributes:
        uri: the run folder.
        record: its ``run.json``.
        finished_at: when ``_RUN.json`` was written; None for an unfinished run.
        totals: sums over the published rows.
        cost: over all sessions so far (`pipeline.runs.sessions.cost_record`).
        stages: seconds of the answered rows; empty where none was answered.
        samples, slowest, most_expensive: rows to show.
        failures: error type -> how often, and the first rows that have it.
        course: rows over time; None where no row says when it was made.
        scores: of a finished run whose rows have any.
    """

    uri: str
    record: dict[str, Any]
    finished_at: str | None
    totals: Totals
    cost: dict[str, Any]
    stages: tuple[StageSeconds, ...]
    samples: tuple[ResultRow, ...]
    slowest: tuple[ResultRow, ...]
    most_expensive: tuple[ResultRow, ...]
    failures: dict[str, tuple[int, tuple[ResultRow, ...]]]
    course: Course | None = None
    scores: RunScores | None = None


def run_figures(uri: str, *, num_samples: int) -> RunFigures:
    """Compute figures over the parts that are published; the run need not be finished.

    Args:
        uri: the run folder.
        num_samples: items with an answer, evenly spread over the run.

    Raises:
        RefusedError: the folder holds no run.
        StorageError: a part cannot be read; ``verify`` names it.
    """
    uri = storage.folder_uri(uri)
    record = read_run_file(uri)
    done = [index for index in list_parts(uri) if index < record["num_shards"]]
    totals = run_totals(uri, done)
    columns = _columns(uri, done)
    answered = np.flatnonzero(~np.isin(columns["status"], list(UNANSWERED)))
    shown: dict[str, Any] = {
        "samples": answered[np.linspace(0, max(len(answered) - 1, 0), min(num_samples, len(answered)), dtype=np.int64)],
        "slowest": _largest(columns["latency_s"]),
        "most_expensive": _largest(columns["cost_usd"]) if totals.sums["cost_usd"] > 0 else [],
    }
    shown |= {name: np.flatnonzero(columns["error_type"] == name)[:_NUM_FAILED] for name in totals.by_error_type}
    places = {
        kind: [Place(int(columns["shard"][row]), int(columns["offset"][row])) for row in rows]
        for kind, rows in shown.items()
    }
    rows = _rows(uri, [place for some in places.values() for place in some])
    finished = read_finished(uri) if is_finished(uri) else {}
    return RunFigures(
        uri=uri,
        record=record,
        finished_at=finished.get("finished_at"),
        totals=totals,
        cost=cost_record(uri, totals.sums["cost_usd"]),
        stages=_stages(columns, answered),
        samples=tuple(rows[place] for place in places["samples"]),
        slowest=tuple(rows[place] for place in places["slowest"]),
        most_expensive=tuple(rows[place] for place in places["most_expensive"]),
        failures={
            name: (count, tuple(rows[place] for place in places[name])) for name, count in totals.by_error_type.items()
        },
        course=course_of(columns["finished_s"], columns["status"] == "failed", session_spans(uri)),
        scores=_scores(uri) if finished and np.isfinite(columns["score"]).any() else None,
    )


def _columns(uri: str, indexes: Sequence[int]) -> dict[str, np.ndarray]:
    """A number or a short word a row, in the order of the parts."""
    names = ["status", "error_type", "cost_usd", "score", *_SECONDS]
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*names, "finished_s", "shard", "offset")}
    for index, table in zip(indexes, read_parts(uri, indexes, [*names, "finished_at"]), strict=True):
        for name in names:
            found[name].append(table[name].to_numpy())  # NaN for a number that is null
        found["finished_s"].append(_seconds_since_1970(table["finished_at"].to_pylist()))
        found["shard"].append(np.full(table.num_rows, index))
        found["offset"].append(np.arange(table.num_rows))
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in found.items()}


def _stages(columns: dict[str, np.ndarray], answered: np.ndarray) -> tuple[StageSeconds, ...]:
    if not len(answered):
        return ()
    known = {}
    for name, (column, *less) in STAGES.items():
        values = columns[column][answered].astype(np.float64)
        for other in less:
            values = values - np.nan_to_num(columns[other][answered].astype(np.float64))
        known[name] = values[np.isfinite(values)].clip(0)  # null: of an earlier version
    sums = {name: float(values.sum(dtype=np.float64)) for name, values in known.items()}
    return tuple(
        StageSeconds(
            name,
            tuple(float(value) for value in np.percentile(values, PERCENTILES)),
            sums[name] / sums["latency"] if sums["latency"] else 0.0,
        )
        for name, values in known.items()
        if len(values)
    )


def _seconds_since_1970(texts: Sequence[str | None]) -> np.ndarray:
    return np.array([np.nan if text is None else datetime.fromisoformat(text).timestamp() for text in texts])


def _scores(uri: str) -> RunScores | None:
    from pipeline.evaluation.run_scores import score_run  # scipy takes a second

    scores = score_run(uri)
    return scores if scores.groups else None


def _largest(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")[:_NUM_EXTREME]


def _rows(uri: str, places: Sequence[Place]) -> dict[Place, ResultRow]:
    found = {}
    for shard in sorted({place.shard for place in places}):
        table = read_rows(storage.join(uri, "data", part_name(shard)))
        for place in {place for place in places if place.shard == shard}:
            (found[place],) = result_rows(table.slice(place.offset, 1))
    return found

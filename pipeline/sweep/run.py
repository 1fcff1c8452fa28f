"""Runs a sweep: every point that is not yet in the results, model by model; then the pictures and the tables."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from illava.families import load_preprocessor
from illava.model_files import require_trained
from pipeline.config.schema import JobConfig
from pipeline.errors import InputError, ItemError
from pipeline.execution.runner import build_loader
from pipeline.execution.signals import Interruption
from pipeline.execution.worker import load_vlm
from pipeline.inputs.build_manifest import build_manifest
from pipeline.records import LoadedItem, MediaItem
from pipeline.redaction import visible
from pipeline.runs.earlier_runs import done_ids
from pipeline.storage import storage
from pipeline.sweep.config import Point, SweepConfig
from pipeline.sweep.measure import build_requests, measure_point
from pipeline.sweep.point_record import PointRecord, point_record
from pipeline.sweep.results import Key, SweepRow, read_results, take_over, write_results

logger = logging.getLogger(__name__)
Measure = Callable[..., dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Holds a sweep with its items frozen and what of it stands in its output.

    Attributes:
        config: the whole sweep.
        items: what every point is measured on.
        records: what the figures of every point depend on, by key.
        done: rows that are there.
    """

    config: SweepConfig
    items: tuple[MediaItem, ...]
    records: dict[Key, PointRecord]
    done: list[SweepRow]

    @property
    def pending(self) -> list[Point]:
        """Wanted points without a row."""
        there = {row.key for row in self.done}
        return [point for point in self.config.wanted() if point.key not in there]


def open_sweep(config: SweepConfig) -> Sweep:
    """Freeze the items, read what is there, and refuse what makes no sense.

    Raises:
        RandomWeightsError: quality is asked of a model that declares random weights.
        RefusedError: the output holds another configuration's rows.
        ConfigError, InputError, StorageError: as a job's.
    """
    points = config.points()
    if config.quality:
        for model in (config.models[name] for name in {point.model for point in config.wanted()}):
            require_trained(model.model_id, revision=model.revision)
    job = config.job(points[0].model, points[0].plan)
    manifest = build_manifest(job, done_ids=done_ids(job))
    records = {point.key: point_record(config, point, manifest.digest) for point in points}
    done = take_over(read_results(config.output.uri), records, config.output.uri)
    return Sweep(config, tuple(manifest.items), records, done)


def run_sweep(config: SweepConfig, *, measure: Measure = measure_point) -> int:
    """Measure what is missing, and return the exit code; the same configuration goes on where it was stopped.

    Args:
        config: the whole sweep.
        measure: of one point; for tests.

    Raises:
        As `open_sweep`; PlanError for a plan that does not fit its model, with all points before it kept.
    """
    from pipeline.sweep.picture import draw_sweep  # before anything is measured: without matplotlib it says so here

    sweep = open_sweep(config)
    pending = sweep.pending
    with Interruption() as interruption:
        interruption.loop_began()  # it is read between two points
        for model in dict.fromkeys(point.model for point in pending):
            _measure_model(sweep, [point for point in pending if point.model == model], measure, interruption)
            if interruption.signal is not None:
                break
    _draw(sweep, draw_sweep)
    if interruption.signal is not None:
        logger.warning("interrupted by %s; the same command goes on", interruption.signal.name)
        return interruption.exit_code
    return 3 if any(row.num_failed or row.num_not_loaded for row in sweep.done) else 0


def _draw(sweep: Sweep, draw_sweep: Callable[[str, Sequence[SweepRow]], str]) -> None:
    """One SVG a table that has rows."""
    for table in sweep.config.tables:
        rows = [row for row in sweep.done if row.table == table]
        if rows:
            uri = f"{sweep.config.output.uri.rstrip('/')}/{table}.svg"
            storage.write_atomic(uri, draw_sweep(f"{sweep.config.name}: {table}", rows).encode())


def _measure_model(sweep: Sweep, points: Sequence[Point], measure: Measure, interruption: Interruption) -> None:
    config, job = sweep.config, sweep.config.job(points[0].model, points[0].plan)
    loaded, num_not_loaded = _load(job, sweep.items)
    vlm = load_vlm(job)
    for point in points:
        vlm.family.check(point.plan)
    requests = build_requests(config, loaded)
    for number, point in enumerate(points, 1):
        if interruption.signal is not None:
            return
        logger.info("%s %d/%d: %s / %s", point.model, number, len(points), point.table, point.row)
        row = SweepRow(
            table=point.table,
            row=point.row,
            model=point.model,
            axes=point.axes,
            plan=json.dumps(point.plan.model_dump(mode="json", exclude_none=True)),
            kinds=[step.reducer.kind for step in point.plan.steps],
            digest=sweep.records[point.key].digest,
            depends_on=sweep.records[point.key].text,
            num_items=len(loaded),
            num_not_loaded=num_not_loaded,
            **measure(vlm, config, loaded, requests, point.plan),
        )
        sweep.done.append(row)
        order = {key: place for place, key in enumerate(sweep.records)}
        sweep.done.sort(key=lambda row: order[row.key])
        write_results(config.output.uri, sweep.done)


def _load(job: JobConfig, items: Sequence[MediaItem]) -> tuple[list[LoadedItem], int]:
    """All items at a model's size, and how many could not be loaded."""
    found: list[LoadedItem] = []
    problems: list[str] = []
    model, limits = job.model, job.media.pixel_limits
    preprocessor = load_preprocessor(model.model_id, revision=model.revision, pixel_limits=limits)
    with closing(build_loader(job, preprocessor)) as loader:
        for item in items:
            try:
                found.append(loader.load(item))
            except ItemError as error:
                problems.append(str(error))
    for problem in problems[:3]:
        logger.warning("left out of the sweep: %s", visible(problem))
    if not found:
        raise InputError(f"none of {len(items)} items can be loaded; the first: {problems[0]}")
    return found, len(problems)

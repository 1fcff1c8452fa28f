"""Runs a few of the items still to do, and estimates time and cost of all of them: `--estimate N`.

Whole groups are drawn: the neighbours about one image, video or document, which the job will load once. One question
of such a group, run alone, would pay for the load that many share. Groups are drawn by seed, stratified by media kind,
and run as a job of their own in a temporary folder. The job's output is not touched.

The sample is a whole command. What it took beside its items (the start of Ray, model and decoders, the first steps of a
cold model, the last part) is taken as it was, once. What its items took is scaled, by how much longer than the items'
own seconds the workers were at them.
"""

from __future__ import annotations

import math
import secrets
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from illava.preprocess import Preprocessor
from pipeline.config.placement import batch_of
from pipeline.config.schema import JobConfig, PricesConfig
from pipeline.cost import actors_usd
from pipeline.errors import ConfigError, InputError, InterruptedRunError
from pipeline.execution.reporting.summary import RunSummary
from pipeline.execution.rows import RunInfo
from pipeline.execution.runner import LoaderFactory, WorkerFactory, build_loader, continue_run
from pipeline.execution.worker import VLMWorker
from pipeline.loading.load_report import ItemLoader
from pipeline.loading.loader import Loader
from pipeline.planning.estimate import Estimate, draw, estimate_total
from pipeline.records import LOAD_FIELDS
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.runs.run import create_or_resume, pending_shards, plan_run
from pipeline.runs.run_folder import Run
from pipeline.runs.run_record import fingerprint_of
from pipeline.storage.uris import printable

_MIN_GROUPS = 4
# Two runs of one job on a machine that others use differ by so much: an interval of wall time is never narrower.
MACHINE_FACTOR = math.sqrt(2)
_WIDEST = MACHINE_FACTOR**2 * 1.001
_NUM_SHOWN = 3
_Group = list[int]  # places in the manifest


@dataclass(frozen=True, slots=True)
class Probe:
    """Holds the estimate for the items still to do.

    Attributes:
        num_items: still to do.
        num_probed: of them, run.
        num_groups: media these were about.
        failures: of the items run that failed: the address's last part, error type and message.
        device_s: VLM actors' seconds, waiting not counted.
        reader_s: readers' seconds.
        fixed_s: what the command takes whatever it holds: Ray's and the model's start, its warm-up, the end.
        wall_s: of the whole command with the configured actors and readers.
        items_usd: sum of the rows' ``cost_usd``.
        load_usd: what all actors' model starts cost.
        total_usd: of the whole command: items, model starts, and actors that wait.
        priced: whether the configuration sets prices.
    """

    num_items: int
    num_probed: int
    num_groups: int
    failures: tuple[tuple[str, str, str], ...]
    device_s: Estimate
    reader_s: Estimate
    fixed_s: float
    wall_s: Estimate
    items_usd: Estimate
    load_usd: float
    total_usd: Estimate
    priced: bool

    @property
    def num_failed(self) -> int:
        """Of the items run, failed."""
        return len(self.failures)


def probe(config: JobConfig, num_groups: int, *, accept: Collection[str] = (), **options: Any) -> Probe:
    """Run all that is asked about ``num_groups`` of the job's pending media, and estimate all items.

    Args:
        config: the whole job; its executor is used as it stands.
        num_groups: media to run, 4 at least; more where the input has many kinds of media. One with more questions than
            ``model.max_batch_requests`` counts once for each batch of them.
        accept: keys in which runs may differ, as `pipeline.runs.run.plan_run` takes them.
        options: as `pipeline.execution.runner.run_job` takes them.

    Raises:
        ConfigError: too few media to see a spread.
        InputError: nothing is left to do.
        PipelineError: as the run itself would.
    """
    run = plan_run(config, accept=accept)
    strata = _strata(run)
    needed = max(_MIN_GROUPS, sum(min(len(stratum), 2) for stratum in strata))
    if num_groups < needed:
        raise ConfigError(f"--estimate {num_groups}: this input needs at least {needed}, two of each kind of media")
    drawn = draw([range(len(stratum)) for stratum in strata], num_groups, seed=config.seed)
    chosen = [[stratum[number] for number in numbers] for stratum, numbers in zip(strata, drawn, strict=True)]
    rows, summary = _run_sample(run, sorted(place for groups in chosen for group in groups for place in group), options)
    sampled = [[[rows[place] for place in group] for group in groups] for groups in chosen]
    num_items = sum(len(group) for stratum in strata for group in stratum)
    return _estimated(summary.placed or config, num_items, [len(stratum) for stratum in strata], sampled, summary)


def _run_sample(run: Run, places: list[int], options: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], RunSummary]:
    """The rows of these items by place, run in a temporary folder; how that command went."""
    options = options | {
        "worker_factory": partial(_warming, options.get("worker_factory", VLMWorker)),
        "loader_factory": partial(_warmed_loader, options.get("loader_factory", build_loader)),
    }
    with tempfile.TemporaryDirectory(prefix="illava-probe-") as folder:
        manifest, per_shard = run.manifest.take(places), len(places)  # a boundary of shards would part a group
        name, nonce = fingerprint_of(run.config_fingerprint.digest, manifest.digest, per_shard), secrets.token_hex(8)
        sample = create_or_resume(
            Run(folder, run.config, run.config_fingerprint, name, run.plan_digest, manifest, per_shard, nonce=nonce)
        )
        summary = continue_run(replace(sample, resumed=True), **options)
        rows = {row["item_id"]: row for table in read_parts(folder, list_parts(folder)) for row in table.to_pylist()}
    if len(rows) < len(places):
        message = f"the estimate was interrupted after {len(rows)} of {len(places)} items; nothing is estimated"
        raise InterruptedRunError(message, summary.exit_code)
    return {place: rows[name] for place, name in zip(places, manifest.item_ids(), strict=True)}, summary


def _warming(factory: WorkerFactory, config: JobConfig, run_info: RunInfo) -> VLMWorker:
    worker = factory(config, run_info)
    worker.warm_up_first()
    return worker


def _warmed_loader(factory: LoaderFactory, config: JobConfig, preprocessor: Preprocessor) -> ItemLoader:
    loader = factory(config, preprocessor)
    if isinstance(loader, Loader):
        loader.warm_up()
    return loader


def _estimated(
    config: JobConfig,
    num_items: int,
    sizes: Sequence[int],
    sampled: Sequence[Sequence[Sequence[dict[str, Any]]]],
    summary: RunSummary,
) -> Probe:
    def total(*columns: str) -> Estimate:
        return estimate_total(
            sizes, [[sum(row[name] for row in group for name in columns) for group in groups] for groups in sampled]
        )

    rows = [row for groups in sampled for group in groups for row in group]
    device_s, reader_s, items_usd = total("gpu_s"), total("fetch_s", "load_s", "preprocess_s"), total("cost_usd")
    start_s = max((worker.start_s for worker in summary.workers), default=0.0)
    at_work_s = max((worker.wall_s - worker.start_s for worker in summary.workers), default=0.0)
    fixed_s, num_actors = summary.wall_s - at_work_s, config.runtime.num_vlm_actors.max
    own_s = sum(row["gpu_s"] for row in rows), sum(_reader_s(row) for row in rows)
    num_busy = max(1, sum(worker.busy_s > 0 for worker in summary.workers))
    longer = max(1.0, at_work_s / max(_side_by_side(config, *own_s, num_actors=num_busy), 1e-9))
    ends = [
        longer * _side_by_side(config, device, reader, num_actors=num_actors)
        for device, reader in zip(_ends(device_s), _ends(reader_s), strict=True)
    ]
    waiting_usd = actors_usd(config, max(0.0, num_actors * ends[0] - device_s.total))
    load_usd = actors_usd(config, start_s * num_actors)
    return Probe(
        num_items=num_items,
        num_probed=len(rows),
        num_groups=sum(map(len, sampled)),
        failures=tuple(_failure(row) for row in rows if row["status"] == "failed"),
        device_s=device_s,
        reader_s=reader_s,
        fixed_s=fixed_s,
        wall_s=_on_this_machine(*(fixed_s + end for end in ends)),
        items_usd=items_usd,
        load_usd=load_usd,
        total_usd=_on_this_machine(*(load_usd + waiting_usd + end for end in _ends(items_usd))),
        priced=config.prices != PricesConfig(),
    )


def _side_by_side(config: JobConfig, device_s: float, reader_s: float, *, num_actors: int) -> float:
    """Seconds of work at these items: the local executor takes turns, on Ray the slower side counts."""
    if config.runtime.executor == "local":
        return device_s + reader_s
    return max(device_s / num_actors, reader_s / config.runtime.num_reader_actors)


def _on_this_machine(total: float, low: float, high: float) -> Estimate:
    """An estimate of time or money that a machine's other work may move as well."""
    return Estimate(total, min(low, total / MACHINE_FACTOR), max(high, total * MACHINE_FACTOR))


def _reader_s(row: dict[str, Any]) -> float:
    return row["fetch_s"] + row["load_s"] + row["preprocess_s"]


def _failure(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["uri"].rpartition("/")[2], row["error_type"], row["error_message"] or ""


def _ends(estimate: Estimate) -> tuple[float, float, float]:
    return estimate.total, estimate.low, estimate.high


def _strata(run: Run) -> list[list[_Group]]:
    """The pending groups, by kind of medium: what they cost differs most between kinds."""
    found: dict[str, list[_Group]] = {}
    for index in pending_shards(run):
        for kind, group in _groups(run, index * run.items_per_shard):
            found.setdefault(kind, []).append(group)
    if not found:
        raise InputError(f"{run.uri}: nothing is left to do, so there is nothing to estimate")
    return [found[kind] for kind in sorted(found)]


def _groups(run: Run, start: int) -> Iterator[tuple[str, _Group]]:
    """A shard's groups as `pipeline.execution.scheduler` makes them: neighbours about one medium, a batch's worth at
    most.
    """
    columns = run.manifest.table.select(LOAD_FIELDS)
    media = columns.slice(start, run.items_per_shard).to_pylist()
    first = 0
    for place, mm_item in enumerate(media[1:], start=1):
        if mm_item != media[first] or place - first == batch_of(run.config):
            yield media[first]["media_kind"], [*range(start + first, start + place)]
            first = place
    yield media[first]["media_kind"], [*range(start + first, start + len(media))]


def render_probe(found: Probe) -> str:
    """Render the estimate as the lines printed below a dry run."""
    media = f", all about {found.num_groups} media" if found.num_groups < found.num_probed else ""
    work_s = found.wall_s.total - found.fixed_s
    lines = [
        ("sample", f"{found.num_probed} of {found.num_items:,} items were run{media}, {found.num_failed} failed"),
        *_failure_lines(found),
        ("time", f"{_span(found.wall_s, _clock)} for the whole command, with the configured actors and readers"),
        (
            "",
            f"{_clock(found.fixed_s)} of it to start (Ray, model, warm-up) and to end, {_clock(work_s)} for the items",
        ),
        ("", f"model {_span(found.device_s, _clock)}, readers {_span(found.reader_s, _clock)} in all"),
    ]
    if found.priced:
        dollars = "${:.4f}".format
        lines.append(("cost", f"{_span(found.total_usd, dollars)} for the whole command"))
        lines.append(
            ("", f"{_span(found.items_usd, dollars)} for the items, {dollars(found.load_usd)} for loading the model")
        )
    else:
        lines.append(("cost", "no prices set; see `prices` in the configuration"))
    lines.append(("", "95 % intervals, from what these items took on this machine, now; time and cost of the whole"))
    lines.append(("", "command span at least a factor of two, as runs of one job on a shared machine do"))
    if found.wall_s.high > _WIDEST * found.wall_s.low:
        lines.append(("", f"these media differ much: --estimate {4 * found.num_groups} halves what hangs on the draw"))
    return "\n".join(f"  {label:<14} {value}" for label, value in lines)


def _failure_lines(found: Probe) -> list[tuple[str, str]]:
    """How many failed of each type, and the first of them by name."""
    if not found.failures:
        return []
    types = Counter(error_type for _, error_type, _ in found.failures)
    lines = [("failures", ", ".join(f"{count} {name}" for name, count in types.most_common()))]
    for name, error_type, message in found.failures[:_NUM_SHOWN]:
        lines.append(("", f"{printable(name, 40)}: {error_type}: {printable(message, 160)}"))
    return lines


def _span(estimate: Estimate, show: Any) -> str:
    return f"{show(estimate.total)} [{show(estimate.low)}, {show(estimate.high)}]"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"

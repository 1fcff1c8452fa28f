"""Runs a few of the items still to do, and estimates time and cost of all of them: `--estimate N`.

Whole groups are drawn: the neighbours about one image, video or document, which the job will load once. One question
of such a group, run alone, would pay for the load that many share. Groups are drawn by seed, stratified by media kind,
and run as a job of their own in a temporary folder. The job's output is not touched.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.schema import JobConfig, PricesConfig
from pipeline.cost import actors_usd
from pipeline.errors import ConfigError, InputError, InterruptedRunError
from pipeline.execution.runner import continue_run
from pipeline.planning.estimate import Estimate, draw, estimate_total
from pipeline.records import LOAD_FIELDS
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.runs.run import create_or_resume, pending_shards, plan_run
from pipeline.runs.run_folder import Run
from pipeline.runs.run_record import fingerprint_of

_MIN_GROUPS = 4
_Group = list[int]  # places in the manifest


@dataclass(frozen=True, slots=True)
class Probe:
    """Holds the estimate for the items still to do.

    Attributes:
        num_items: still to do.
        num_probed: of them, run.
        num_groups: media these were about.
        num_failed: of the items run, failed.
        device_s: VLM actors' seconds, waiting not counted.
        reader_s: readers' seconds.
        wall_s: of the whole job with the configured actors and readers: the slower side, and one model start.
        items_usd: sum of the rows' ``cost_usd``.
        load_usd: what all actors' model starts cost.
        priced: whether the configuration sets prices.
    """

    num_items: int
    num_probed: int
    num_groups: int
    num_failed: int
    device_s: Estimate
    reader_s: Estimate
    wall_s: Estimate
    items_usd: Estimate
    load_usd: float
    priced: bool


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
    rows, start_s, placed = _run_sample(
        run, sorted(place for groups in chosen for group in groups for place in group), options
    )
    sampled = [[[rows[place] for place in group] for group in groups] for groups in chosen]
    num_items = sum(len(group) for stratum in strata for group in stratum)
    return _estimated(placed, num_items, [len(stratum) for stratum in strata], sampled, start_s=start_s)


def _run_sample(
    run: Run, places: list[int], options: dict[str, Any]
) -> tuple[dict[int, dict[str, Any]], float, JobConfig]:
    """The rows of these items by place, run in a temporary folder; seconds of a model's start; the placed job."""
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
    start_s = max((worker.start_s for worker in summary.workers), default=0.0)
    by_place = {place: rows[name] for place, name in zip(places, manifest.item_ids(), strict=True)}
    return by_place, start_s, summary.placed or run.config


def _estimated(
    config: JobConfig,
    num_items: int,
    sizes: Sequence[int],
    sampled: Sequence[Sequence[Sequence[dict[str, Any]]]],
    *,
    start_s: float,
) -> Probe:
    def total(*columns: str) -> Estimate:
        return estimate_total(
            sizes, [[sum(row[name] for row in group for name in columns) for group in groups] for groups in sampled]
        )

    runtime = config.runtime
    num_actors = runtime.num_vlm_actors.max
    device_s, reader_s = total("gpu_s"), total("fetch_s", "load_s", "preprocess_s")
    ends = zip(_ends(device_s), _ends(reader_s), strict=True)
    slower = [max(device / num_actors, reader / runtime.num_reader_actors) + start_s for device, reader in ends]
    rows = [row for groups in sampled for group in groups for row in group]
    return Probe(
        num_items=num_items,
        num_probed=len(rows),
        num_groups=sum(map(len, sampled)),
        num_failed=sum(row["status"] == "failed" for row in rows),
        device_s=device_s,
        reader_s=reader_s,
        wall_s=Estimate(*slower),
        items_usd=total("cost_usd"),
        load_usd=actors_usd(config, start_s * num_actors),
        priced=config.prices != PricesConfig(),
    )


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
        if mm_item != media[first] or place - first == run.config.model.max_batch_requests:
            yield media[first]["media_kind"], [*range(start + first, start + place)]
            first = place
    yield media[first]["media_kind"], [*range(start + first, start + len(media))]


def render_probe(found: Probe) -> str:
    """Render the estimate as the lines printed below a dry run."""
    slow = "readers" if found.wall_s.total and found.reader_s.total > found.device_s.total else "model"
    media = f", all about {found.num_groups} media" if found.num_groups < found.num_probed else ""
    lines = [
        ("sample", f"{found.num_probed} of {found.num_items:,} items were run{media}, {found.num_failed} failed"),
        ("time", f"{_span(found.wall_s, _clock)} with the configured actors and readers; one model start included"),
        ("", f"model {_span(found.device_s, _clock)}, readers {_span(found.reader_s, _clock)} in all; most by {slow}"),
    ]
    if found.priced:
        cost = _span(found.items_usd, "${:.4f}".format)
        lines.append(
            ("cost", f"{cost} for the items, ${found.load_usd:.4f} for loading the model; idle time not counted")
        )
    else:
        lines.append(("cost", "no prices set; see `prices` in the configuration"))
    lines.append(("", "95 % intervals, from what these items took on this machine, now"))
    return "\n".join(f"  {label:<14} {value}" for label, value in lines)


def _span(estimate: Estimate, show: Any) -> str:
    return f"{show(estimate.total)} [{show(estimate.low)}, {show(estimate.high)}]"


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"

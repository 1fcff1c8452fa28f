"""`--plan --probe N`: runs a few of the items still to do, and estimates time and cost of all of them.

The items are drawn by seed, stratified by medium, and run as a job of their own in a temporary folder; the job's output
is not touched. Knows nothing of what items are.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config import JobConfig, PricesConfig
from pipeline.cost import actors_usd
from pipeline.errors import ConfigError, InputError
from pipeline.estimate import Estimate, draw, estimate_total
from pipeline.runner import continue_run
from pipeline.shards import Run, claim, pending_shards, plan_run
from pipeline.sink import list_parts, read_parts

_MIN_ITEMS = 4


@dataclass(frozen=True, slots=True)
class Probe:
    """What a probe foretells of the items still to do.

    Attributes:
        num_items: still to do.
        num_probed: of them, run.
        num_failed: of those, failed.
        device_s: VLM actors' seconds, waiting not counted.
        reader_s: readers' seconds.
        wall_s: of the whole job with the configured actors and readers: the slower side, and one model start.
        items_usd: sum of the rows' ``cost_usd``.
        load_usd: what all actors' model starts cost.
        priced: whether the configuration sets prices.
    """

    num_items: int
    num_probed: int
    num_failed: int
    device_s: Estimate
    reader_s: Estimate
    wall_s: Estimate
    items_usd: Estimate
    load_usd: float
    priced: bool


def probe(config: JobConfig, num_items: int, **options: Any) -> Probe:
    """Run ``num_items`` of the job's pending items and estimate all of them.

    Args:
        config: the whole job; its executor is used as it stands.
        num_items: to run, 4 at least; more where the input has many kinds of media.
        options: as `pipeline.runner.run_job` takes them.

    Raises:
        ConfigError: too few items to see a spread.
        InputError: nothing is left to do.
        PipelineError: as the run itself would.
    """
    run = plan_run(config)
    strata = _strata(run)
    needed = max(_MIN_ITEMS, sum(min(len(stratum), 2) for stratum in strata))
    if num_items < needed:
        raise ConfigError(f"--probe {num_items}: this input needs at least {needed}, two of each kind of media")
    chosen = draw(strata, num_items, seed=config.seed)
    with tempfile.TemporaryDirectory(prefix="illava-probe-") as folder:
        manifest = run.manifest.take(sorted(place for places in chosen for place in places))
        sample = claim(replace(run, uri=folder, manifest=manifest, nonce=secrets.token_hex(8), resumed=False))
        summary = continue_run(sample, **options)
        rows = {row["item_id"]: row for table in read_parts(folder, list_parts(folder)) for row in table.to_pylist()}
    if len(rows) < len(manifest):
        raise InputError(f"the probe was interrupted after {len(rows)} of {len(manifest)} items; nothing is estimated")
    ids = dict(zip(sorted(place for places in chosen for place in places), manifest.item_ids(), strict=True))
    sampled = [[rows[ids[place]] for place in places] for places in chosen]
    start_s = max((worker.start_s for worker in summary.workers), default=0.0)
    return _foretell(config, [len(stratum) for stratum in strata], sampled, start_s=start_s)


def _foretell(
    config: JobConfig, sizes: Sequence[int], sampled: Sequence[Sequence[dict[str, Any]]], *, start_s: float
) -> Probe:
    def total(*columns: str) -> Estimate:
        return estimate_total(sizes, [[sum(row[name] for name in columns) for row in rows] for rows in sampled])

    runtime = config.runtime
    num_actors = runtime.num_vlm_actors.max
    device_s, reader_s = total("gpu_s"), total("fetch_s", "load_s", "preprocess_s")
    ends = zip(_ends(device_s), _ends(reader_s), strict=True)
    slower = [max(device / num_actors, reader / runtime.num_reader_actors) + start_s for device, reader in ends]
    rows = [row for part in sampled for row in part]
    return Probe(
        num_items=sum(sizes),
        num_probed=len(rows),
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


def _strata(run: Run) -> list[list[int]]:
    """Places of the pending items, by kind of medium: what they cost differs most between kinds."""
    kinds = run.manifest.table["media_kind"].to_pylist()
    found: dict[str, list[int]] = {}
    for index in pending_shards(run):
        start = index * run.items_per_shard
        for place in range(start, min(start + run.items_per_shard, len(kinds))):
            found.setdefault(kinds[place], []).append(place)
    if not found:
        raise InputError(f"{run.uri}: nothing is left to do, so there is nothing to estimate")
    return [found[kind] for kind in sorted(found)]


def render_probe(found: Probe) -> str:
    """The estimate as the lines printed below a plan."""
    slow = "readers" if found.wall_s.total and found.reader_s.total > found.device_s.total else "model"
    lines = [
        ("probe", f"{found.num_probed} of {found.num_items:,} items were run, {found.num_failed} failed"),
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

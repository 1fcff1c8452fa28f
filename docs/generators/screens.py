"""docs/screens.md: what demo, dry run, progress, summary and status print, by the code that prints it.

Dry run and renderers are the program's own. Counts are those of the shipped demo; seconds, which vary, are those of one
run on two cores. What `make demo` prints is kept in ``demo_screen.txt``: a test runs the demo and compares.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

from docs.generators.markdown import GENERATED
from illava.requests import TokenUsage
from pipeline.config.load import load_config
from pipeline.config.schema import JobConfig
from pipeline.cost import Spending
from pipeline.execution.lease import QueueDepths
from pipeline.execution.reporting.progress import Bottleneck, Progress
from pipeline.execution.reporting.summary import RunStats, RunSummary, render_summary
from pipeline.execution.rows import RowMaker, RunInfo
from pipeline.execution.worker import WorkerUsage
from pipeline.inputs.input_counts import InputCounts
from pipeline.inspection.status import RunStatus, render_status
from pipeline.planning.dry_run import render_dry_run
from pipeline.planning.estimate import Estimate
from pipeline.planning.probe import Probe, render_probe
from pipeline.records import MediaItem, ResultRow
from pipeline.runs.totals import Totals

ROOT = Path(__file__).resolve().parents[2]
DEMO_SCREEN = Path(__file__).with_name("demo_screen.txt")
_URI, _CONFIG = "runs/demo", "configs/demo.yaml"
_NUM_ITEMS, _NUM_PUBLISHED = 8, 4
_COUNTS = InputCounts(10, 8, outside_pattern={".jsonl": 2})
_TEXT = "A red triangle moves right."
_USAGE = TokenUsage(1568, 352, 393, 105, 105, 121, 10)  # of a clip of eight frames


def page() -> str:
    """The whole page."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            str(ROOT / _CONFIG), ["runtime.gpus_per_actor=0", "model.device=cpu", f"output.uri={folder}/out", *_paths()]
        )
        dry_run = _as_printed(render_dry_run(config).replace(f"{folder}/out", _URI))
    rows = [_row(config, number) for number in range(_NUM_ITEMS)]
    parts = [
        (_DEMO, "make demo", DEMO_SCREEN.read_text("utf-8").rstrip()),
        (_DRY_RUN, f"illava caption --config {_CONFIG} --dry-run", dry_run),
        (_ESTIMATE, f"illava caption --config {_CONFIG} --estimate 4", render_probe(_probe())),
        (_PROGRESS, f"illava caption --config {_CONFIG}", _progress(rows)),
        (_SUMMARY, "", render_summary(_summary(config, rows))),
        (_STATUS, f"illava status {_URI}", render_status(_status(rows))),
    ]
    blocks = []
    for text, command, screen in parts:
        shown = f"```sh\n{command}\n```\n\n" if command else ""
        blocks.append(f"{text}\n\n{shown}```text\n{screen}\n```")
    return "\n\n".join([GENERATED, "# What the screens say", _INTRODUCTION, *blocks]) + "\n"


def _paths() -> list[str]:
    """The configuration's relative paths, as seen from the repository's root."""
    return [f"input.uri={ROOT}/configs/demo/clips/", f"model.model_id={ROOT}/configs/demo/model"]


def _as_printed(text: str) -> str:
    return re.sub(r"[\d.]+ GB here", "25.3 GB here", text.replace(f"{ROOT}/", ""))


def _row(config: JobConfig, number: int) -> ResultRow:
    """The row of one of the demo's clips."""
    item = MediaItem(f"{number}", (f"configs/demo/clips/clip_{number:03}.mp4",), "video", (1,), ("",))
    row = RowMaker(config, RunInfo("", "")).failed(item, "internal_error", "", attempts=1, shard_index=0)
    counts = {name: getattr(_USAGE, name) for name in TokenUsage.__slots__ if name.startswith("num_")}
    return replace(row, status="ok", error_type=None, text=_TEXT, **counts)


def _progress(rows: list[ResultRow]) -> str:
    stats, bottleneck = RunStats(), Bottleneck()
    progress = Progress(_NUM_ITEMS, stats, terminal=False)
    for row in rows[:_NUM_PUBLISHED]:
        progress.add(row)
    bottleneck.observe(QueueDepths(0, 3, 8, 0, 8), 27.3)
    bottleneck.observe(QueueDepths(2, 0, 3, 0, 8), 2.7)
    progress._waits_for = bottleneck.verdict()
    return progress.line(30.0)


def _summary(config: JobConfig, rows: list[ResultRow]) -> RunSummary:
    stats = RunStats()
    for row in rows:
        stats.add(row)
    worker = WorkerUsage(wall_s=7.4, start_s=3.1, busy_s=2.6, idle_s=1.7)
    return RunSummary(
        exit_code=0,
        name=config.name,
        output_uri=_URI,
        num_items=_NUM_ITEMS,
        num_done_before=0,
        stats=stats,
        wall_s=18.4,
        cost=None,
        workers=(worker,),
        counts=_COUNTS,
        placed=config,
    )


def _status(rows: list[ResultRow]) -> RunStatus:
    names = ("num_patches", "num_patches_kept", "num_vision_tokens", "num_vision_tokens_kept")
    sums = {name: sum(getattr(row, name) for row in rows) for name in (*names, "num_decoder_tokens_kept")}
    totals = Totals(_NUM_ITEMS, {"ok": _NUM_ITEMS}, {}, {"stop": _NUM_ITEMS}, sums)
    return RunStatus(
        uri=_URI,
        finished=True,
        num_items=_NUM_ITEMS,
        num_shards=2,
        num_shards_done=2,
        attempt=1,
        created_at="2026-11-30T12:00:00+00:00",
        totals=totals,
        counts=_COUNTS,
        rate=8 / 18.4,
        spent=Spending(wall_s=18.4, actor_s=7.4, load_s=3.1, idle_s=1.7),
        num_sessions=1,
    )


def _probe() -> Probe:
    nothing = Estimate(0.0, 0.0, 0.0)
    return Probe(
        num_items=8,
        num_probed=4,
        num_groups=4,
        failures=(),
        device_s=Estimate(2.6, 2.1, 3.1),
        reader_s=Estimate(0.7, 0.5, 0.9),
        fixed_s=15.3,
        wall_s=Estimate(18.6, 13.2, 26.3),
        items_usd=nothing,
        load_usd=0.0,
        total_usd=nothing,
        priced=False,
    )


_INTRODUCTION = """\
Each screen says what a reduction keeps in the same three lines: patches in -> out of the tower, tokens into the language model -> its last layer, and
one share, **kept**: visual tokens in the language model's last layer, of those the unreduced model has there (column `retention_ratio` of
[a row](rows.md)). Half a line says the same of an item, and of the rows so far. Seconds vary, and so do the answers of a near-tie."""
_DEMO = "## Demo\n\nThe tiny model with merging and without, and a few layers of a published model's shape."
_DRY_RUN = "## Dry run\n\nCounted from geometry; nothing is loaded."
_ESTIMATE = "## Estimate\n\nBelow the dry run. See [cost and capacity](cost-and-capacity.md)."
_PROGRESS = "## Progress\n\nOn a terminal a bar; elsewhere a line each 30 seconds, such as this after the first shard."
_SUMMARY = "## Summary\n\nWhen the command ends."
_STATUS = "## Status\n\nOf a run at any moment; of a folder of runs a line each."

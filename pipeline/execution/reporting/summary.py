"""Sums a run's rows while it goes on (`RunStats`), and renders the lines printed at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.config.placement import said
from pipeline.cost import RunCost
from pipeline.execution.reporting.failures import FailureExamples, command_for
from pipeline.inputs.input_counts import InputCounts
from pipeline.records import ResultRow
from pipeline.redaction import visible
from pipeline.retention import Retention
from pipeline.runs.page_counts import PageCounts
from pipeline.storage.uris import printable

if TYPE_CHECKING:
    from pipeline.config.schema import JobConfig
    from pipeline.evaluation.run_scores import RunScores
    from pipeline.execution.worker import WorkerUsage


@dataclass(slots=True)
class RunStats:
    """Sums over rows, in the order in which they are made."""

    num_rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    error_types: Counter[str] = field(default_factory=Counter)
    num_patches: int = 0
    num_patches_kept: int = 0
    failures: FailureExamples = field(default_factory=FailureExamples)
    num_vision_tokens: int = 0
    num_vision_tokens_kept: int = 0
    num_decoder_tokens_kept: int = 0
    num_generated_tokens: int = 0
    num_loops: int = 0
    pages: PageCounts = field(default_factory=PageCounts)
    bytes_fetched: int = 0
    gpu_s: float = 0.0
    cpu_s: float = 0.0
    cost_usd: float = 0.0
    example: tuple[str, str] | None = None  # address and text of a row, if possible one with something to read

    def add(self, row: ResultRow) -> None:
        """Count one row."""
        self.num_rows += 1
        self.statuses[row.status] += 1
        if row.status == "failed" and row.error_type:
            self.error_types[row.error_type] += 1
            self.failures.add(row)
        self.num_patches += row.num_patches
        self.num_patches_kept += row.num_patches_kept or 0
        self.num_vision_tokens += row.num_vision_tokens
        self.num_vision_tokens_kept += row.num_vision_tokens_kept
        self.num_decoder_tokens_kept += row.num_decoder_tokens_kept
        self.num_generated_tokens += row.num_generated_tokens
        self.num_loops += row.finish_reason == "loop"
        self.pages.add(row.pages, row.num_pages)
        self.bytes_fetched += row.bytes_fetched
        self.gpu_s += row.gpu_s
        self.cpu_s += row.cpu_s
        self.cost_usd += row.cost_usd
        if row.text and (self.example is None or not self.example[1].strip()):
            self.example = row.uri, row.text

    @property
    def retention(self) -> Retention:
        """What the reduction left of the visual tokens."""
        return Retention.of(self)


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Holds how a command ended.

    Attributes:
        exit_code: exit code of the process.
        name: name of the job.
        output_uri: the run folder.
        num_items: items of the whole run.
        num_done_before: items whose shards were published before this command.
        num_skipped: items of the input that an earlier run has done (``input.exclude_runs``).
        counts: what the input held when the run began; None where that is not known.
        num_left: items whose shards are not published; 0 unless interrupted or out of budget.
        budget_spent: whether the budget ended the command early.
        budget_said: the budget, whose it is, and what was spent of it; "" without one.
        failed_too_often: whether more items failed than ``runtime.max_failed`` allows.
        run_error_types: failed rows of the whole run by type; empty where the run is not finished.
        stats: sums over the rows that this command made.
        wall_s: wall time of this command after its items were listed, model loading included.
        cost: cost of this command's rows and of its actors' loading and waiting; None where no prices are set.
        workers: where the workers' wall time went.
        scores: of a finished question-answering run; also in its folder, as ``scores.json``.
        interrupted_by: name of the signal that ended the command early.
        placed: the job with the device chosen for this command; None where the command had nothing to do.
    """

    exit_code: int
    name: str
    output_uri: str
    num_items: int
    num_done_before: int
    stats: RunStats
    wall_s: float
    cost: RunCost | None
    workers: tuple[WorkerUsage, ...] = ()
    scores: RunScores | None = None
    num_skipped: int = 0
    counts: InputCounts | None = None
    num_left: int = 0
    budget_spent: bool = False
    budget_said: str = ""
    failed_too_often: bool = False
    run_error_types: Mapping[str, int] = field(default_factory=dict)
    interrupted_by: str | None = None
    placed: JobConfig | None = None


def render_summary(summary: RunSummary) -> str:
    """Render the block that is printed when a command ends."""
    stats = summary.stats
    lines = [f"{summary.name}: {_outcome(summary)}"]
    if stats.num_rows:
        lines += [
            _line("rows", ", ".join(f"{stats.statuses[kind]} {kind}" for kind in ("ok", "partial", "failed"))),
            _line("throughput", _throughput(summary)),
            *([_line("device", said(summary.placed))] if summary.placed else []),
        ]
    if pages := str(stats.pages):
        lines.append(_line("pages", pages))
    lines += [_line(label, text) for label, text in stats.retention.lines]
    if stats.num_loops:
        lines.append(_line("loops", f"{stats.num_loops} answers repeat themselves (finish_reason loop)"))
    if stats.error_types:
        lines.append(_line("failures", ", ".join(f"{n} {kind}" for kind, n in stats.error_types.most_common())))
        lines += [_line("", line) for line in _failed_items(stats)]
    if summary.counts and len(summary.counts.terms()) > 1:
        lines += [_line("input", text) for text in summary.counts.lines()]
    if stats.num_rows:
        lines.append(_line("cost", _cost(summary)))
    if stats.example:
        lines.append(_line("example", _example(*stats.example)))
    lines += [_line("output", summary.output_uri), _line("next", _next_command(summary))]
    return "\n".join(lines)


def render_line(summary: RunSummary) -> str:
    """Render outcome, failures, cost and run folder in one line, for a cron mail."""
    statuses = summary.stats.statuses
    parts = [f"{summary.name}: {_outcome(summary)}"]
    if summary.stats.num_rows:
        parts.append(f"{statuses['ok']} ok, {statuses['partial']} partial, {statuses['failed']} failed")
    if summary.stats.num_rows and summary.cost is not None:
        parts.append(f"${summary.cost.total_usd:.4f}")
    return "; ".join([*parts, summary.output_uri])


def _line(label: str, value: str) -> str:
    return f"  {label:<14} {value}"


def _outcome(summary: RunSummary) -> str:
    if summary.interrupted_by:
        left = f"{summary.num_left} of {summary.num_items} items are left"
        return f"interrupted by {summary.interrupted_by}; complete shards are published, {left}"
    if summary.budget_spent:
        done = f"{summary.stats.num_rows} items begun and finished" if summary.stats.num_rows else "nothing begun"
        left = f"{summary.num_left} of {summary.num_items} items are left"
        return f"stopped at its budget of {summary.budget_said}; {done}, {left}"
    if summary.failed_too_often and summary.num_left:
        failed = f"{summary.stats.statuses['failed']} of {summary.stats.num_rows} items FAILED"
        return f"{failed}, more than runtime.max_failed allows; stopped, {summary.num_left} items are left"
    if not summary.num_items and summary.num_skipped:
        return f"nothing new, {summary.num_skipped} items were done by earlier runs"
    if not summary.stats.num_rows:
        return f"nothing to do, all {summary.num_items} items have their rows"
    before = f", {summary.num_done_before} published before" if summary.num_done_before else ""
    before += f", {summary.num_skipped} done by earlier runs" if summary.num_skipped else ""
    if summary.stats.statuses["failed"] == summary.stats.num_rows:
        return f"ALL {summary.stats.num_rows} items FAILED, in {summary.wall_s:.1f} s{before}"
    return f"{summary.stats.num_rows} of {summary.num_items} items in {summary.wall_s:.1f} s{before}"


def _throughput(summary: RunSummary) -> str:
    stats, wall_s = summary.stats, max(summary.wall_s, 1e-9)
    text = f"{stats.num_rows / wall_s:.2f} items/s, {stats.num_generated_tokens / wall_s:.1f} tokens/s"
    busy = _share(summary.workers)
    return f"{text}, model loading included" + (f"; devices busy {busy:.0%}" if busy else "")


def _share(workers: Sequence[WorkerUsage]) -> float:
    wall_s = sum(worker.wall_s for worker in workers)
    return sum(worker.busy_s for worker in workers) / wall_s if wall_s else 0.0


def _cost(summary: RunSummary) -> str:
    cost, rows = summary.cost, summary.stats.num_rows
    if cost is None:
        return "no prices set; see `prices` in the configuration"
    parts = f"{cost.items_usd:.4f} items, {cost.load_usd:.4f} loading the model, {cost.idle_usd:.4f} idle"
    parts += f", {cost.lost_usd:.4f} lost" if cost.lost_usd > 0.001 * cost.total_usd else ""
    return f"${cost.total_usd:.4f} (${cost.per_item_usd(rows):.6f} an item; {parts})"


def _example(uri: str, text: str) -> str:
    words = " ".join(text.split()) or "(nothing but white space)"
    return f"{printable(uri.rpartition('/')[2], 40)}: {printable(words, 160)}"


def _next_command(summary: RunSummary) -> str:
    if summary.failed_too_often and summary.num_left:
        return "mend what the failures name; the same command resumes, and tries those of unpublished shards again"
    if summary.interrupted_by or summary.budget_spent:
        return "the same command resumes"
    if summary.run_error_types:
        return command_for(summary.run_error_types, summary.output_uri)
    return f"illava verify {summary.output_uri}"


def _failed_items(stats: RunStats) -> list[str]:
    items = stats.failures.items
    lines = [f"{printable(one.name, 100)}: {one.error_type}: {visible(printable(one.message, 160))}" for one in items]
    more = stats.statuses["failed"] - len(items)
    return [*lines, f"and {more} more"] if more else lines

"""Runs a job (`run_job`): manifest -> shards -> executor -> sink, with progress, interruption and the exit code.

`executors` decides how and where items are executed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from illava.families import load_preprocessor
from illava.preprocess import Preprocessor
from pipeline.config.placement import said
from pipeline.config.preflight import preflight
from pipeline.config.schema import JobConfig, PricesConfig
from pipeline.cost import Spending, run_cost, spending
from pipeline.execution.batch_limit import with_batch_limit
from pipeline.execution.budget import BUDGET_EXIT_CODE, Budget, BudgetGuard, said_used_up
from pipeline.execution.executors import (
    Executor,
    Gauges,
    RowListener,
    job_gauges,
    open_executor,
    placed_run,
    row_listeners,
)
from pipeline.execution.publisher import Publisher
from pipeline.execution.reporting.failures import FAILURES_EXIT_CODE, failed_too_often
from pipeline.execution.reporting.summary import RunStats, RunSummary
from pipeline.execution.reporting.watch import Watch
from pipeline.execution.rows import RunInfo
from pipeline.execution.scheduler import Scheduler
from pipeline.execution.scheduling import build_scheduler
from pipeline.execution.signals import Interruption
from pipeline.execution.worker import VLMWorker, WorkerUsage
from pipeline.inputs.build_manifest import readable_roots
from pipeline.inputs.passwords import read_passwords
from pipeline.loading.load_report import ItemLoader, ReadingUsage
from pipeline.loading.loader import Loader
from pipeline.log import add_log_fields
from pipeline.runs.earlier_runs import log_differences
from pipeline.runs.parquet_sink import ParquetSink
from pipeline.runs.retry import RetrySink
from pipeline.runs.run import finish, open_planned, pending_shards, plan_run, unfinish
from pipeline.runs.run_folder import Run, is_finished
from pipeline.runs.sessions import Session, other_sessions
from pipeline.runs.totals import run_totals
from pipeline.tasks.build import build_task

if TYPE_CHECKING:
    from pipeline.evaluation.run_scores import RunScores

logger = logging.getLogger(__name__)
WorkerFactory = Callable[[JobConfig, RunInfo], VLMWorker]
LoaderFactory = Callable[[JobConfig, Preprocessor], ItemLoader]


def build_loader(config: JobConfig, preprocessor: Preprocessor) -> ItemLoader:
    """Build the loader of one reader; each reader has its share of the cache."""
    runtime = config.runtime
    return Loader(
        config.media,
        preprocessor,
        cache_dir=runtime.cache_dir,
        cache_bytes=runtime.reader_cache_bytes,
        allowed_roots=readable_roots(config),
        pages_per_request=build_task(config.task).media_per_request,
    )


def run_job(
    config: JobConfig,
    *,
    worker_factory: WorkerFactory = VLMWorker,
    loader_factory: LoaderFactory = build_loader,
    budget: Budget | None = None,
    accept: Collection[str] = (),
    debug: bool = False,
) -> RunSummary:
    """Process the items of a job that have no row yet; the same configuration resumes a run.

    Args:
        config: the whole job.
        worker_factory: builds a worker inside each VLM actor; must be picklable.
        loader_factory: builds a loader inside each reader; must be picklable.
        budget: once it is used up no further shard is opened; open shards are finished. One of the whole run counts
            what its other sessions spend, too.
        accept: keys in which the folder's run, or an earlier one, may differ, as `pipeline.runs.run.plan_run` says.
        debug: whether to show the actors' own output.

    Raises:
        PipelineError: the run cannot be opened or cannot go on; the error's `exit_code` says of which kind it is.
            Published shards stay, and the same command resumes from there.
    """
    run = plan_run(config, accept=accept)
    return continue_run(run, worker_factory=worker_factory, loader_factory=loader_factory, budget=budget, debug=debug)


def continue_run(
    run: Run,
    *,
    worker_factory: WorkerFactory = VLMWorker,
    loader_factory: LoaderFactory = build_loader,
    budget: Budget | None = None,
    debug: bool = False,
) -> RunSummary:
    """Process the items of a planned or opened run that have no row yet; otherwise as `run_job`."""
    began_s = time.perf_counter()
    config = run.config
    add_log_fields(run=run.uri)
    done, used_up = _Work(), said_used_up(budget, run.uri)
    log_differences(run.earlier, run.accepted)
    with Interruption() as interruption:
        if (pending := pending_shards(run)) and not used_up:
            preprocessor = load_preprocessor(
                config.model.model_id, revision=config.model.hub_revision, pixel_limits=config.media.pixel_limits
            )
            found = preflight(config, run.config_fingerprint.fields["model.dtype"])
            with placed_run(run, debug=debug) as (on_device, cluster):
                interruption.reinstall()
                config = with_batch_limit(on_device, run, pending, found)
                # Only now is run.json created. One of a job that cannot start would refuse the corrected job.
                run = open_planned(run)
                if "document" in run.manifest.kinds:
                    run = replace(run, passwords=read_passwords(config))
                logger.info("%s: the model is on %s", config.name, said(config))
                executor = partial(
                    open_executor,
                    config,
                    cluster,
                    make_loader=partial(loader_factory, config, preprocessor),
                    make_worker=partial(worker_factory, config, _run_info(run)),
                )
                placed = replace(run, config=config)
                done = _work(
                    placed,
                    preprocessor,
                    interruption,
                    open_executor=executor,
                    listeners=row_listeners(config, cluster),
                    gauges=job_gauges(config, cluster),
                    budget=budget,
                    began_s=began_s,
                )
        else:
            run = open_planned(run)
    summary = RunSummary(
        exit_code=interruption.exit_code,
        name=config.name,
        output_uri=run.uri,
        num_items=len(run.manifest),
        num_done_before=len(run.manifest) - done.num_pending,
        num_skipped=run.manifest.num_done,
        counts=run.manifest.counts,
        stats=done.stats,
        wall_s=time.perf_counter() - began_s,
        cost=None if config.prices == PricesConfig() else run_cost(done.spent, done.stats.cost_usd),
        workers=done.workers,
        interrupted_by=interruption.signal.name if interruption.signal else None,
        placed=done.placed,
        budget_said=done.budget_said or used_up,
    )
    left = pending_shards(run)
    if left and interruption.signal:
        return replace(summary, num_left=_sink(run).count_items(left))
    if left and _failed_too_often(run, done.stats):
        num_left = _sink(run).count_items(left)
        return replace(summary, num_left=num_left, exit_code=FAILURES_EXIT_CODE, failed_too_often=True)
    if left and budget is not None:
        return replace(summary, num_left=_sink(run).count_items(left), exit_code=BUDGET_EXIT_CODE, budget_spent=True)
    return _finished(run, summary)


def _failed_too_often(run: Run, stats: RunStats) -> bool:
    return failed_too_often(run.config.runtime.max_failed, stats.statuses["failed"], len(run.manifest))


@dataclass(frozen=True, slots=True)
class _Work:
    """Holds what one command did for a run; the defaults stand for a command that had nothing to do.

    Attributes:
        num_pending: items without a row when the command began.
        stats: sums over the rows it made.
        workers: where the workers' wall time went.
        spent: what the command spent in all.
        placed: the job with the chosen device; None where the command had nothing to do.
        budget_said: the budget, and what was spent of it; "" without one.
    """

    num_pending: int = 0
    stats: RunStats = field(default_factory=RunStats)
    workers: tuple[WorkerUsage, ...] = ()
    spent: Spending = field(default_factory=Spending)
    placed: JobConfig | None = None
    budget_said: str = ""


def _work(
    run: Run,
    preprocessor: Preprocessor,
    interruption: Interruption,
    *,
    open_executor: Callable[[Scheduler], AbstractContextManager[Executor]],
    listeners: list[RowListener],
    gauges: Gauges | None,
    budget: Budget | None,
    began_s: float,
) -> _Work:
    """Run the event loop of a placed run until all shards are published, the budget is used up or a signal arrives."""
    config, pending, stats = run.config, pending_shards(run), RunStats()
    sink = _sink(run)
    num_pending = sink.count_items(pending)
    unfinish(run)
    record = Session(run)
    add_log_fields(session=record.name)
    others = partial(other_sessions, run.uri, but=record.name)
    budget_guard = BudgetGuard(config, budget, stats, began_s=began_s, others=others)
    watch = Watch(run.uri, record.name, num_pending, stats, gauges)
    scheduler = build_scheduler(
        run, pending, sink, preprocessor, run_info=_run_info(run), listeners=[watch.progress.add, *listeners]
    )
    with _ended_if_it_fails(record, budget_guard), closing(watch), open_executor(scheduler) as executor:
        interruption.loop_began()
        with closing(Publisher(sink, scheduler)) as publisher:
            while not (scheduler.done or interruption.signal or _failed_too_often(run, stats)):
                executor.poll()
                publisher.poll()
                watch.tick(scheduler, executor)
                if not budget_guard.allows_more(scheduler.num_in_work):
                    scheduler.stop_opening()
                budget_guard.note_in(record)
        workers, reading = executor.usage(), executor.reading
    spent = _spending(config, workers, reading, wall_s=time.perf_counter() - began_s)
    record.end(spent, num_rows=stats.num_rows)
    return _Work(num_pending, stats, tuple(workers), spent, config, budget_guard.said)


@contextmanager
def _ended_if_it_fails(record: Session, budget_guard: BudgetGuard) -> Iterator[None]:
    """Record that the session ended also where an error ends it: nobody shall take it for one still at work."""
    try:
        yield
    except BaseException:
        record.end(None, so_far=budget_guard.so_far)
        raise


def _sink(run: Run) -> ParquetSink | RetrySink:
    return RetrySink(run) if run.least_attempts else ParquetSink(run)


def _spending(config: JobConfig, workers: list[WorkerUsage], reading: ReadingUsage, *, wall_s: float) -> Spending:
    return spending(
        config,
        wall_s=wall_s,
        actor_s=sum(worker.wall_s for worker in workers),
        load_s=sum(worker.start_s for worker in workers),
        idle_s=sum(worker.idle_s for worker in workers),
        reader_cpu_s=reading.cpu_s,
        storage_requests=reading.storage_requests,
    )


def _run_info(run: Run) -> RunInfo:
    return RunInfo(run.config_fingerprint.digest, run.fingerprint, run.plan_digest)


def _finished(run: Run, summary: RunSummary) -> RunSummary:
    """Write ``_RUN.json`` and derive the exit code from all rows of the run, those of earlier sessions included.

    A session that made rows writes the file again: another driver may have finished the run before these rows were
    published.
    """
    if is_finished(run.uri) and not summary.stats.num_rows:
        totals = run_totals(run.uri, range(run.num_shards)).as_dict()
    else:
        totals = finish(run, _session(summary))["totals"]
    num_failed, error_types = totals["by_status"].get("failed", 0), totals["by_error_type"]
    too_often = failed_too_often(run.config.runtime.max_failed, num_failed, len(run.manifest))
    exit_code = FAILURES_EXIT_CODE if too_often else 3 if num_failed else 0
    return replace(
        summary,
        exit_code=exit_code,
        interrupted_by=None,
        failed_too_often=too_often,
        run_error_types=error_types,
        scores=_scores(run) if run.config.task.kind == "question" else None,
    )


def _scores(run: Run) -> RunScores:
    """Score all rows of a finished run, and write ``scores.json`` anew: an earlier attempt may have left one."""
    from pipeline.evaluation.run_scores import score_run, write_scores  # takes a second

    scores = score_run(run.uri)
    write_scores(run.uri, scores)
    return scores


def _session(summary: RunSummary) -> dict[str, Any]:
    """Return what ``_RUN.json`` records of the session that finished the run."""
    return {
        "wall_s": summary.wall_s,
        "num_rows": summary.stats.num_rows,
        "num_done_before": summary.num_done_before,
        "workers": [asdict(worker) for worker in summary.workers],
    }

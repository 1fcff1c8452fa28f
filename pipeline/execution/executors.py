"""Connects to a cluster, chooses the device there, and opens the executor that processes a run's items.

Shards, and when to stop, are the runner's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Protocol

from pipeline.config.placement import place_here, place_on_ray
from pipeline.config.schema import JobConfig
from pipeline.execution.local_executor import LocalExecutor
from pipeline.execution.scheduler import Scheduler
from pipeline.execution.worker import VLMWorker, WorkerUsage
from pipeline.loading.load_report import ItemLoader, ReadingUsage
from pipeline.records import ResultRow
from pipeline.runs.run_folder import Run

if TYPE_CHECKING:
    from pipeline.execution.ray.actors import RayCluster

logger = logging.getLogger(__name__)
RowListener = Callable[[ResultRow], None]


class Gauges(Protocol):
    """Takes the present state of a job: `pipeline.execution.ray.metrics.JobGauges`."""

    def set(self, *, planned: int, waiting: int, in_work: int, actors: dict[str, int]) -> None:
        """Set all gauges."""


class Executor(Protocol):
    """Turns leases into rows.

    Attributes:
        reading: what the loads took so far.
    """

    reading: ReadingUsage

    @property
    def capacity(self) -> int | None:
        """Items that fill the batches of the started workers; None where loading and working alternate."""

    @property
    def actors(self) -> dict[str, int]:
        """How many ``vlm`` and ``reader`` actors have started and stand."""

    def poll(self) -> None:
        """Advance every part by one small step."""

    def usage(self) -> list[WorkerUsage]:
        """Return where the workers' wall time went."""

    def close(self) -> None:
        """End the workers and loaders that were started."""


@contextmanager
def placed_run(run: Run, *, debug: bool) -> Iterator[tuple[JobConfig, RayCluster | None]]:
    """Choose a run's device, and the GPUs of an actor, where the run is executed.

    Yields:
        The job with device and GPUs filled in; and the Ray cluster, None for ``executor: local``.

    Raises:
        ConfigError, DeviceError: the job asks for a device that is not there.
        ClusterError: Ray cannot be started or reached.
    """
    dtype = {"dtype": run.config_fingerprint.fields["model.dtype"]}
    config = run.config.model_copy(update={"model": run.config.model.model_copy(update=dtype)})
    if config.runtime.executor == "local":
        yield place_here(config), None
        return
    from pipeline.execution.ray.joining import check_listens

    check_listens()
    from pipeline.execution.ray.actors import connect

    with connect(config.runtime, debug=debug) as cluster:
        yield place_on_ray(config, cluster.gpus()), cluster


def row_listeners(config: JobConfig, cluster: RayCluster | None) -> list[RowListener]:
    """Return the listeners that every row is reported to: the cluster's metrics; none for ``executor: local``."""
    if cluster is None:
        return []
    from pipeline.execution.ray.metrics import RowMetrics

    return [RowMetrics(cluster, job=config.name).add]


def job_gauges(config: JobConfig, cluster: RayCluster | None) -> Gauges | None:
    """Return what shows the job's state among the cluster's metrics; None for ``executor: local``."""
    if cluster is None:
        return None
    from pipeline.execution.ray.metrics import JobGauges

    return JobGauges(cluster, job=config.name)


@contextmanager
def open_executor(
    config: JobConfig,
    cluster: RayCluster | None,
    scheduler: Scheduler,
    *,
    make_loader: Callable[[], ItemLoader],
    make_worker: Callable[[], VLMWorker],
) -> Iterator[Executor]:
    """Open the executor of a placed job; on exit, all of its actors are ended."""
    if cluster is None:
        with closing(LocalExecutor(config, scheduler, make_loader=make_loader, make_worker=make_worker)) as local:
            yield local
        return
    from pipeline.execution.ray.executor import RayExecutor

    most = config.runtime.num_vlm_actors.max
    logger.info("loading the model %s, in up to %d actor%s", config.model.model_id, most, "s" * (most > 1))

    executor = RayExecutor(cluster, config, scheduler, make_loader=make_loader, make_worker=make_worker)
    with closing(executor):
        yield executor

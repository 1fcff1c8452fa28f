"""Where a run's items are executed: the cluster it joins or starts, the device chosen there, and the executor.

Knows nothing of shards, rows or when to stop.
"""

from __future__ import annotations

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

RowListener = Callable[[ResultRow], None]


class Executor(Protocol):
    """What turns leases into rows.

    Attributes:
        reading: what its loads took so far.
    """

    reading: ReadingUsage

    @property
    def capacity(self) -> int | None:
        """Items that fill the batches of the workers that stand; None where it takes turns with itself."""

    def poll(self) -> None:
        """Move everything on by one small step."""

    def usage(self) -> list[WorkerUsage]:
        """Where the workers' wall time went."""

    def close(self) -> None:
        """End what was started."""


@contextmanager
def placed_run(run: Run, *, debug: bool) -> Iterator[tuple[JobConfig, RayCluster | None]]:
    """A run's job with the device and the GPUs an actor chosen where it runs, and the cluster; None for ``local``.

    Raises:
        ConfigError, DeviceError: the job asks for a device that is not there.
        ClusterError: Ray cannot be started or reached.
    """
    dtype = {"dtype": run.config_fingerprint.fields["model.dtype"]}
    config = run.config.model_copy(update={"model": run.config.model.model_copy(update=dtype)})
    if config.runtime.executor == "local":
        yield place_here(config), None
        return
    from pipeline.execution.ray.actors import connect

    with connect(config.runtime, debug=debug) as cluster:
        yield place_on_ray(config, cluster.gpus()), cluster


def row_listeners(config: JobConfig, cluster: RayCluster | None) -> list[RowListener]:
    """Who is told of every row where the job runs: the cluster's metrics; nobody for ``local``."""
    if cluster is None:
        return []
    from pipeline.execution.ray.metrics import RowMetrics

    return [RowMetrics(cluster, job=config.name).add]


@contextmanager
def open_executor(
    config: JobConfig,
    cluster: RayCluster | None,
    scheduler: Scheduler,
    *,
    make_loader: Callable[[], ItemLoader],
    make_worker: Callable[[], VLMWorker],
) -> Iterator[Executor]:
    """The executor of a placed job; none of its actors is left when this ends."""
    if cluster is None:
        with closing(LocalExecutor(config, scheduler, make_loader=make_loader, make_worker=make_worker)) as local:
            yield local
        return
    from pipeline.execution.ray.executor import RayExecutor

    executor = RayExecutor(cluster, config, scheduler, make_loader=make_loader, make_worker=make_worker)
    with closing(executor):
        yield executor

"""Wraps Ray: defines the two actors, connects to a cluster, and maps Ray's exceptions to the pipeline's own.

No other file imports Ray. Payloads go from reader to model through Ray's object store; the driver holds references and
small reports only.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# Ray reads these when it is first imported. A key that the user has set is kept.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
if "RAY_ADDRESS" not in os.environ:
    # Off (as on macOS and Windows), a local cluster listens on loopback only; on, its ports are open to the network.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError

from illava.errors import ILLaVAError
from pipeline.config.placement import ClusterGPUs, gpus_of
from pipeline.config.schema import JobConfig, RuntimeConfig
from pipeline.errors import ClusterError, MissingPackageError, PipelineError
from pipeline.execution.ray.joining import REACH_S, Joining, unreachable
from pipeline.known_errors import known_error
from pipeline.loading.load_report import ItemLoader, LoadReport, load_reported
from pipeline.log import LogSettings, log_like, log_settings
from pipeline.phases import phase
from pipeline.records import LoadedItem, MediaItem, ResultRow

if TYPE_CHECKING:
    from pipeline.execution.worker import VLMWorker, WorkerUsage

# How long one call of a VLM actor steps its batch. The driver keeps two calls queued, so the batch never waits.
SLICE_S = 0.05
_OBJECT_STORE_MIN_BYTES = 100_000_000


class ActorLostError(Exception):
    """An actor's process is gone, or must not be used any more."""


class PayloadLostError(Exception):
    """Loaded media were lost from the object store before their call began."""


@dataclass(frozen=True, slots=True)
class BatchInput:
    """Describes one item of a call to a VLM actor.

    Attributes:
        item: as in the manifest.
        payload_index: which payload of the call holds the item's media; items may share one.
        attempts: times the item was started.
        shard_index: the shard that the item belongs to.
    """

    item: MediaItem
    payload_index: int
    attempts: int
    shard_index: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """Holds the result of one `VLMActor.advance`.

    Attributes:
        finished: rows, each with the seconds that the worker had its item until the end of the call.
        usage: where the worker's wall time went so far.
    """

    finished: tuple[tuple[ResultRow, float], ...]
    usage: WorkerUsage


class ReaderActor:
    """Holds one loader. `start` makes it, so that its errors arrive as errors and not as the actor's death."""

    def __init__(self, make_loader: Callable[[], ItemLoader], log: LogSettings | None = None) -> None:
        log_like(log)
        self._make_loader = make_loader

    def start(self) -> int:
        """Make the loader; return the process id."""
        self._loader = self._make_loader()
        return os.getpid()

    def load(self, item: MediaItem) -> tuple[LoadReport, LoadedItem | None]:
        """Return report and media as two objects: the driver fetches the first, a VLM actor the second."""
        return load_reported(self._loader, item)

    def close(self) -> None:
        """End the decoder's child process and remove the cache."""
        self._loader.close()


class VLMActor:
    """Holds one worker. `start` makes it and so loads the model."""

    def __init__(self, make_worker: Callable[[], VLMWorker], log: LogSettings | None = None) -> None:
        log_like(log)
        self._make_worker = make_worker

    def start(self) -> int:
        """Load the model; return the process id."""
        self._worker = self._make_worker()
        return os.getpid()

    def advance(self, inputs: Sequence[BatchInput], *payloads: LoadedItem) -> StepResult:
        """Take items over, then step the batch for a time slice or until the batch is empty."""
        until_s = time.perf_counter() + SLICE_S
        for one in inputs:
            loaded = payloads[one.payload_index].for_item(one.item)
            self._worker.add(loaded, attempts=one.attempts, shard_index=one.shard_index)
        outcomes = []
        while self._worker.pending:
            outcomes += self._worker.step()
            if time.perf_counter() >= until_s:
                break
        now_s = time.perf_counter()
        return StepResult(tuple((done.row, now_s - done.taken_s) for done in outcomes), self.usage())

    def usage(self) -> WorkerUsage:
        """Return where the worker's wall time went so far."""
        return self._worker.usage()


class RayCluster:
    """Starts actors, waits for their answers and ends them. Made by `connect`."""

    @property
    def address(self) -> str:
        """Where another driver finds this cluster (RAY_ADDRESS)."""
        return ray.get_runtime_context().gcs_address

    def spawn_reader(self, make_loader: Callable[[], ItemLoader]) -> Any:
        """Start a reader on one CPU core."""
        return ray.remote(ReaderActor).options(num_cpus=1, max_restarts=0).remote(make_loader, log_settings())

    def spawn_vlm(self, config: JobConfig, make_worker: Callable[[], VLMWorker]) -> Any:
        """Start a VLM actor on the cores and GPUs that a placed job gives each."""
        needs = {"num_cpus": config.runtime.cpus_per_actor, "num_gpus": gpus_of(config)}
        return ray.remote(VLMActor).options(**needs, max_restarts=0).remote(make_worker, log_settings())

    def placed(self, actor: Any) -> Any:
        """Return a reference that is ready when the actor has a process, before any of its calls is answered."""
        return actor.__ray_ready__.remote()

    def load(self, reader: Any, item: MediaItem) -> tuple[Any, Any]:
        """Start a load; return references to the report and to the media."""
        return reader.load.options(num_returns=2).remote(item)

    def wait(self, references: Sequence[Any], timeout_s: float) -> list[Any]:
        """Return all references that are ready; wait for the first one, at most ``timeout_s``."""
        if not references:
            time.sleep(timeout_s)
            return []
        refs = list(references)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return ready

    def result(self, reference: Any) -> Any:
        """Return the answer of a call that is ready.

        Raises:
            PipelineError, ILLaVAError: the actor says that the run cannot go on.
            ActorLostError: the actor died, or raised an error after which it must not be used.
            PayloadLostError: the arguments of the call were lost.
        """
        try:
            return ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            if isinstance(cause, (PipelineError, ILLaVAError)):
                raise cause from None
            if isinstance(cause, ObjectLostError):
                raise PayloadLostError(str(cause)) from cause
            if isinstance(cause, ImportError) and (known := known_error(cause)):
                raise MissingPackageError(f"in an actor on Ray: {known.words}") from cause
            raise ActorLostError(f"{type(cause).__name__}: {cause}") from cause
        except ObjectLostError as error:
            raise PayloadLostError(str(error)) from error
        except RayActorError as error:
            raise ActorLostError(_reason(error)) from error
        except RayError as error:
            raise ActorLostError(f"{type(error).__name__}: {_reason(error)}") from error

    def wait_all(self, references: Sequence[Any], timeout_s: float) -> list[Any]:
        """Wait until all references are ready or the time is up; return those that are ready."""
        refs = list(references)
        return ray.wait(refs, num_returns=len(refs), timeout=timeout_s)[0] if refs else []

    def kill(self, actor: Any) -> None:
        """End an actor's process."""
        ray.kill(actor, no_restart=True)

    def metric(
        self, kind: Literal["counter", "gauge", "histogram"], name: str, description: str, **options: Any
    ) -> Any:
        """Make a metric that the cluster exports; options as in `ray.util.metrics`."""
        from ray.util import metrics

        kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
        return kinds[kind](name, description, **options)

    def gpus(self) -> ClusterGPUs:
        """Return the GPUs of the cluster, and whether an autoscaler may add some."""
        nodes = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
        # Ray's own libraries ask the same; there is no public name for it in 2.60. None without an autoscaler.
        most = ray._private.state.state.get_max_resources_from_cluster_config() or {}
        return ClusterGPUs(max(nodes, default=0), may_come=most.get("GPU", 0) > sum(nodes))

    def resources(self) -> str:
        """Return the cluster's CPUs and GPUs, for messages."""
        total = ray.cluster_resources()
        return ", ".join(f"{total.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))


@contextmanager
def connect(runtime: RuntimeConfig, *, debug: bool = False) -> Iterator[RayCluster]:
    """Use this process's Ray session, connect to RAY_ADDRESS (set by ``ray job submit``), or start a local cluster.

    Raises:
        ClusterError: the cluster cannot be started or reached.
    """
    if ray.is_initialized():
        yield RayCluster()
        return
    address = os.environ.get("RAY_ADDRESS")
    joining = Joining()
    try:
        if address:
            with phase(f"reaching the Ray cluster at {address} (RAY_ADDRESS), {REACH_S:g} s at most", after_s=0):
                init = partial(ray.init, logging_level=logging.ERROR, log_to_driver=debug)
                joining.call(init, timeout_s=REACH_S)
        else:
            with phase("starting Ray on this machine", after_s=0):
                _start_local(runtime, debug=debug)
    except Exception as error:  # Ray raises no class of its own where a node is too slow to start
        if address:
            raise ClusterError(unreachable(address, error)) from error
        raise ClusterError(
            f"cannot start a local Ray cluster: {error}; --set runtime.executor=local runs without Ray"
        ) from error
    try:
        yield RayCluster()
    finally:
        ray.shutdown()
        joining.close()


def _start_local(runtime: RuntimeConfig, *, debug: bool) -> None:
    """Start a cluster of our own on loopback, closed to everyone without this run's token."""
    if not os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        # Without a token Ray writes one below the home folder, and every later cluster of this user requires it.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    root = str(Path(__file__).resolve().parents[3])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    ray.init(
        address="local",
        num_cpus=math.ceil(runtime.num_vlm_actors.max * runtime.cpus_per_actor) + runtime.num_reader_actors,
        object_store_memory=_object_store_bytes(runtime),
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=debug,
        _node_ip_address="127.0.0.1",
    )


def _object_store_bytes(runtime: RuntimeConfig) -> int | None:
    """Return bytes for all media that may be in flight; None (Ray's choice) where that exceeds a usual /dev/shm."""
    wanted = max(int(runtime.max_inflight_bytes * 1.25), _OBJECT_STORE_MIN_BYTES)
    return wanted if wanted <= 2_000_000_000 else None


def _reason(error: Exception) -> str:
    """Return the one line of Ray's message that names the error: the last one of a traceback, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if any("Traceback" in line or "ray::" in line for line in lines) else lines[0]

"""The one door to Ray: the two actors, the cluster they run on, and Ray's exceptions in the pipeline's own words.

Payloads go from reader to model through Ray's object store; the driver holds references and small reports only.
Knows nothing of leases or shards.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# Read by Ray when it is first imported. A key already set by the user stands.
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
from pipeline.known_errors import known_error
from pipeline.loading.load_report import ItemLoader, LoadReport, load_reported
from pipeline.records import LoadedItem, MediaItem, ResultRow

if TYPE_CHECKING:
    from pipeline.execution.worker import VLMWorker, WorkerUsage

# One call of a VLM actor steps its batch for so long. The driver keeps two calls queued, so the batch never waits.
SLICE_S = 0.05
_OBJECT_STORE_MIN_BYTES = 100_000_000


class ActorLostError(Exception):
    """The process of an actor is gone, or no longer fit for use."""


class PayloadLostError(Exception):
    """Loaded media vanished from the object store before their call began."""


@dataclass(frozen=True, slots=True)
class BatchInput:
    """What a VLM actor is told of one item.

    Attributes:
        item: as in the manifest.
        place: of its media among the payloads of the call; items may share one.
        attempts: times it was started.
        shard_index: the shard it belongs to.
    """

    item: MediaItem
    place: int
    attempts: int
    shard_index: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of one `VLMActor.advance`.

    Attributes:
        finished: rows, each with how long the worker had its item by the end of the call.
        usage: where the worker's wall time went so far.
    """

    finished: tuple[tuple[ResultRow, float], ...]
    usage: WorkerUsage


class ReaderActor:
    """Holds one loader, made by `start`, so that its errors arrive as errors and not as deaths."""

    def __init__(self, make_loader: Callable[[], ItemLoader]) -> None:
        self._make_loader = make_loader

    def start(self) -> int:
        """Make the loader; process id."""
        self._loader = self._make_loader()
        return os.getpid()

    def load(self, item: MediaItem) -> tuple[LoadReport, LoadedItem | None]:
        """Report and media as two objects: the driver fetches the first, a VLM actor the second."""
        return load_reported(self._loader, item)

    def close(self) -> None:
        """End the decoder's child process and remove the cache."""
        self._loader.close()


class VLMActor:
    """Holds one worker, made by `start`, which loads the model."""

    def __init__(self, make_worker: Callable[[], VLMWorker]) -> None:
        self._make_worker = make_worker

    def start(self) -> int:
        """Load the model; process id."""
        self._worker = self._make_worker()
        return os.getpid()

    def advance(self, entries: Sequence[BatchInput], *payloads: LoadedItem) -> StepResult:
        """Take items over, then step the batch for a time slice or until it is empty."""
        until_s = time.perf_counter() + SLICE_S
        for entry in entries:
            loaded = payloads[entry.place].for_item(entry.item)
            self._worker.add(loaded, attempts=entry.attempts, shard_index=entry.shard_index)
        outcomes = []
        while self._worker.pending:
            outcomes += self._worker.step()
            if time.perf_counter() >= until_s:
                break
        now_s = time.perf_counter()
        return StepResult(tuple((done.row, now_s - done.taken_s) for done in outcomes), self.usage())

    def usage(self) -> WorkerUsage:
        """Where the worker's wall time went so far."""
        return self._worker.usage()


class RayCluster:
    """Starts actors, waits for their answers and ends them. Made by `connect`."""

    @property
    def address(self) -> str:
        """Where another driver finds this cluster (RAY_ADDRESS)."""
        return ray.get_runtime_context().gcs_address

    def spawn_reader(self, make_loader: Callable[[], ItemLoader]) -> Any:
        """A reader on one CPU core."""
        return ray.remote(ReaderActor).options(num_cpus=1, max_restarts=0).remote(make_loader)

    def spawn_vlm(self, config: JobConfig, make_worker: Callable[[], VLMWorker]) -> Any:
        """A VLM actor on the cores and GPUs that a placed job gives each."""
        needs = {"num_cpus": config.runtime.cpus_per_actor, "num_gpus": gpus_of(config)}
        return ray.remote(VLMActor).options(**needs, max_restarts=0).remote(make_worker)

    def placed(self, actor: Any) -> Any:
        """A reference that is ready when the actor has a process, before any of its calls is answered."""
        return actor.__ray_ready__.remote()

    def load(self, reader: Any, item: MediaItem) -> tuple[Any, Any]:
        """References to the report and to the media."""
        return reader.load.options(num_returns=2).remote(item)

    def wait(self, references: Sequence[Any], timeout_s: float) -> list[Any]:
        """All that are ready; waits for the first of them, at most so long."""
        if not references:
            time.sleep(timeout_s)
            return []
        refs = list(references)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        return ready

    def result(self, reference: Any) -> Any:
        """The answer of a call that is ready.

        Raises:
            PipelineError, ILLaVAError: the run cannot go on, as the actor itself says.
            ActorLostError: the actor died, or raised what it does not survive.
            PayloadLostError: its arguments vanished.
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
        """Those that are ready when all are, or the time is up."""
        refs = list(references)
        return ray.wait(refs, num_returns=len(refs), timeout=timeout_s)[0] if refs else []

    def kill(self, actor: Any) -> None:
        """End an actor's process."""
        ray.kill(actor, no_restart=True)

    def metric(self, kind: Literal["counter", "histogram"], name: str, description: str, **options: Any) -> Any:
        """A metric that the cluster exports; options as of `ray.util.metrics`."""
        from ray.util import metrics

        return {"counter": metrics.Counter, "histogram": metrics.Histogram}[kind](name, description, **options)

    def gpus(self) -> ClusterGPUs:
        """The GPUs there are, and whether an autoscaler may add some."""
        nodes = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
        # What Ray's own libraries ask; there is no public name for it in 2.60. None without an autoscaler.
        most = ray._private.state.state.get_max_resources_from_cluster_config() or {}
        return ClusterGPUs(max(nodes, default=0), may_come=most.get("GPU", 0) > sum(nodes))

    def resources(self) -> str:
        """What the cluster has, for messages."""
        total = ray.cluster_resources()
        return ", ".join(f"{total.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))


@contextmanager
def connect(runtime: RuntimeConfig, *, debug: bool = False) -> Iterator[RayCluster]:
    """The cluster in RAY_ADDRESS (set by ``ray job submit``), a session this process has, or a local one of our own.

    Raises:
        ClusterError: it cannot be started or reached.
    """
    if ray.is_initialized():
        yield RayCluster()
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(logging_level=logging.ERROR, log_to_driver=debug)
        else:
            _start_local(runtime, debug=debug)
    except Exception as error:  # Ray raises no class of its own where a node is too slow to start
        place = f"reach the Ray cluster at {address} (RAY_ADDRESS)" if address else "start a local Ray cluster"
        raise ClusterError(f"cannot {place}: {error}; --set runtime.executor=local runs without Ray") from error
    try:
        yield RayCluster()
    finally:
        ray.shutdown()


def _start_local(runtime: RuntimeConfig, *, debug: bool) -> None:
    """Our own cluster on loopback, closed to everyone without this run's token."""
    if not os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        # Given none, Ray writes one below the home folder, and every later cluster of this user asks for it.
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
    """Room for all that may be in flight, or Ray's own choice where that is more than a machine usually gives."""
    wanted = max(int(runtime.max_inflight_bytes * 1.25), _OBJECT_STORE_MIN_BYTES)
    return wanted if wanted <= 2_000_000_000 else None


def _reason(error: Exception) -> str:
    """The telling line of Ray's many: the last, where a traceback ends in the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if any("Traceback" in line or "ray::" in line for line in lines) else lines[0]

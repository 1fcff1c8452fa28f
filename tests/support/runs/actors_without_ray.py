"""Provides a cluster whose actors answer every call at once, in this process, for tests of the driver."""

from __future__ import annotations

from types import SimpleNamespace

from pipeline.execution.ray.actors import ActorLostError
from pipeline.execution.scheduler import Scheduler
from pipeline.execution.worker import WorkerUsage


class Answer:
    def __init__(self, value) -> None:
        self.value = value


class Actor:
    """Answers calls while a test leaves it `alive`; afterwards every answer raises its loss, with its `stderr_tail`."""

    def __init__(self, usage: WorkerUsage, *, stderr_tail: str | None) -> None:
        self.alive, self._stderr_tail = stderr_tail is None, stderr_tail or "gone"
        self._answers = {"start": 1, "usage": usage, "close": None}

    def __getattr__(self, method: str):
        return SimpleNamespace(remote=lambda: self._answer(method))

    def _answer(self, method: str) -> Answer:
        return Answer(self._answers[method] if self.alive else ActorLostError(self._stderr_tail))


class Cluster:
    """Has the methods of `pipeline.execution.ray.actors.RayCluster` that an executor without items uses.

    Args:
        stderr_tail: last output of all its actors; if given, they are dead before they have started.
    """

    def __init__(self, *, stderr_tail: str | None = None) -> None:
        self.vlms: list[Actor] = []
        self._stderr_tail = stderr_tail

    def spawn_vlm(self, config, make_worker) -> Actor:
        usage = WorkerUsage(wall_s=9.0, start_s=1.0, idle_s=8.0)
        self.vlms.append(Actor(usage, stderr_tail=self._stderr_tail))
        return self.vlms[-1]

    def spawn_reader(self, make_loader) -> Actor:
        return Actor(WorkerUsage(), stderr_tail=self._stderr_tail)

    def placed(self, actor) -> Answer:
        return actor.start.remote()

    def wait(self, references, timeout_s):
        return list(references)

    wait_all = wait

    def result(self, reference):
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, actor) -> None:
        actor.alive = False

    def resources(self) -> str:
        return "2 CPU"


def idle_scheduler() -> Scheduler:
    """Make a scheduler without items."""
    nothing: dict = dict.fromkeys(("estimate_bytes", "failed_row", "on_row"))
    return Scheduler([], lambda index: None, **nothing, max_inflight_bytes=1, max_open_shards=1, max_attempts=1)

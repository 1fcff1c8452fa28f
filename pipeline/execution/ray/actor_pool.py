"""Decides how many actors are requested, tracks the state of each, and counts the deaths that end a job.

Work starts with one reader and one VLM actor. More are requested only afterwards: on a small cluster, many actors of
one kind would take the place of the first of the other kind. Actors that wait for a place start when the cluster grows.

Plain state and pure decisions, without Ray and without a clock; `pipeline.execution.ray.executor` carries them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from pipeline.errors import ClusterError
from pipeline.execution.lease import Lease
from pipeline.execution.worker import WorkerUsage

CALLS_PER_ACTOR = 2
START_TIMEOUT_S = 1800.0
SAY_WAITING_EVERY_S = 30.0
# A cluster that lost the node of the only reader, and is full of VLM actors, never has a place for another one.
RELEASE_AFTER_S = 15.0
_MIN_DEATHS = 8  # several items that end their actor may follow one another; each is a row after two or three deaths
_MIN_DEATHS_WHILE_STARTING = 4  # while an actor starts, no item can be the cause


@dataclass(slots=True, eq=False)
class ReaderHandle:
    """Tracks one reader.

    Attributes:
        actor: the cluster's handle.
        placed: whether the actor has a process.
        started: whether the actor has its loader.
        queue: items that the reader was given to load.
        calls: references of calls without an answer.
    """

    actor: Any
    placed: bool = False
    started: bool = False
    queue: list[Lease] = field(default_factory=list)
    calls: set[Any] = field(default_factory=set)

    @property
    def has_capacity(self) -> bool:
        """Whether the reader can take one more item."""
        quarantined = any(lease.load_quarantined for lease in self.queue)
        return self.started and not quarantined and len(self.queue) < CALLS_PER_ACTOR

    @property
    def releasable(self) -> bool:
        """Whether the reader has a place and holds no item that would be lost."""
        return self.placed and not self.queue


@dataclass(slots=True, eq=False)
class VLMHandle:
    """Tracks one VLM actor; as `ReaderHandle`, except that the scheduler tracks its items, by the actor's name."""

    name: str
    actor: Any
    placed: bool = False
    started: bool = False
    calls: set[Any] = field(default_factory=set)
    usage: WorkerUsage = field(default_factory=WorkerUsage)

    @property
    def releasable(self) -> bool:
        """Whether the actor has a place; the items it holds start again elsewhere."""
        return self.placed


@dataclass(frozen=True, slots=True)
class PoolState:
    """Counts the actors of one kind.

    Attributes:
        num_placed: actors that have a process, be it still loading its model.
        num_waiting: actors that are requested and have no place.
        max_actors: actors that the job wants.
        num_started: actors that are ready for work.
    """

    num_placed: int
    num_waiting: int
    max_actors: int
    num_started: int = 0

    @classmethod
    def of(cls, handles: Sequence[ReaderHandle | VLMHandle], max_actors: int) -> Self:
        """Count the actors of one kind by their handles."""
        num_placed, num_started = sum(handle.placed for handle in handles), sum(handle.started for handle in handles)
        return cls(num_placed, len(handles) - num_placed, max_actors, num_started)


@dataclass(frozen=True, slots=True)
class ScaleDecision:
    """Tells the executor how to change the number of actors of one kind.

    Attributes:
        add: actors to request.
        cancel: actors without a place to cancel.
        release: whether to end one actor that has a place.
    """

    add: int = 0
    cancel: int = 0
    release: bool = False


class ActorPoolAutoscaler:
    """Decides how many readers and VLM actors to request, and what to print while too few are ready.

    Args:
        min_vlms: started VLM actors that the job needs; with fewer it ends after `START_TIMEOUT_S`.
        now_s: the present time; all methods must be given times of the same clock.
    """

    def __init__(self, min_vlms: int, *, now_s: float) -> None:
        self._min_vlms = min_vlms
        self._both_placed_s = self._enough_s = self._said_s = now_s

    def decide(self, vlms: PoolState, readers: PoolState, *, now_s: float) -> tuple[ScaleDecision, ScaleDecision]:
        """Decide how to change the number of VLM actors, and that of readers."""
        if vlms.num_placed and readers.num_placed:
            self._both_placed_s = now_s
        release = now_s - self._both_placed_s >= RELEASE_AFTER_S
        return _decision(vlms, readers, release=release), _decision(readers, vlms, release=release)

    def released(self, *, now_s: float) -> None:
        """Record that an actor was released: the other kind now has `RELEASE_AFTER_S` to take the place."""
        self._both_placed_s = now_s

    def waiting_message(
        self, vlms: PoolState, readers: PoolState, *, resources: Callable[[], str], now_s: float
    ) -> str:
        """Return a line to print while too few actors are ready, every `SAY_WAITING_EVERY_S` seconds; else "".

        Raises:
            ClusterError: too few actors were ready for `START_TIMEOUT_S`.
        """
        if vlms.num_started >= self._min_vlms and readers.num_started:
            self._enough_s = self._said_s = now_s
            return ""
        waited_s = now_s - self._enough_s
        if waited_s < START_TIMEOUT_S and now_s - self._said_s < SAY_WAITING_EVERY_S:
            return ""
        self._said_s = now_s
        message = (
            f"waiting for actors for {waited_s:.0f} s: {vlms.num_started} VLM actors of at least {self._min_vlms} and "
            f"{readers.num_started} readers are ready; the cluster has {resources()}"
        )
        if waited_s >= START_TIMEOUT_S:
            raise ClusterError(f"{message}; lower runtime.gpus_per_actor, cpus_per_actor or num_vlm_actors.min")
        return message


def _decision(mine: PoolState, other: PoolState, *, release: bool) -> ScaleDecision:
    """Decide about one kind of actor, given the other kind, without which it has no work.

    Args:
        release: whether one of the two kinds has had no placed actor for too long.
    """
    if not mine.num_placed:
        return ScaleDecision(cancel=mine.num_waiting - 1) if mine.num_waiting else ScaleDecision(add=1)
    if other.num_placed:
        return ScaleDecision(add=mine.max_actors - mine.num_placed - mine.num_waiting)
    return ScaleDecision(cancel=mine.num_waiting, release=release and mine.num_placed > 1)


class CircuitBreaker:
    """Counts deaths of one kind of actor; too many without a success in between end the job.

    Args:
        what: names the kind in the message.
        num_actors: actors that work at a time.
    """

    def __init__(self, what: str, num_actors: int) -> None:
        self._what, self._num_actors = what, num_actors
        self._in_a_row = self._starting_in_a_row = 0

    def record_success(self) -> None:
        """Record that an actor finished a call."""
        self._in_a_row = self._starting_in_a_row = 0

    def record_death(self, reason: Exception, *, while_starting: bool) -> None:
        """Record that an actor died.

        Raises:
            ClusterError: too many actors died in a row.
        """
        self._in_a_row += 1
        self._starting_in_a_row += while_starting
        at_work = max(_MIN_DEATHS, 3 * self._num_actors)
        starting = max(_MIN_DEATHS_WHILE_STARTING, 2 * self._num_actors)
        if self._in_a_row >= at_work or self._starting_in_a_row >= starting:
            place = " while starting" if self._starting_in_a_row >= starting else ""
            raise ClusterError(
                f"{self._what} died {self._in_a_row} times in a row{place} without finishing anything; the last one "
                f"said: {reason}. Complete shards are published: mend the cause and run the same command again"
            )

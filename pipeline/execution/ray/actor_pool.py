"""The actors that the driver asked for: what each is at, how many there should be, and how many deaths end the job.

Work starts with one of each kind; more are asked for only then, since on a small cluster the many of one kind would
take the place of the first of the other. What waits for a place starts when the cluster grows. Plain state and pure
decisions, which `pipeline.execution.ray.executor` carries out; knows nothing of Ray or clocks.
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
_MIN_DEATHS = 8  # several items that end their actor may stand one behind another; each is a row after two or three
_MIN_DEATHS_WHILE_STARTING = 4  # there no item can be the cause


@dataclass(slots=True, eq=False)
class ReaderSlot:
    """A reader.

    Attributes:
        actor: the cluster's handle.
        placed: it has a process.
        started: it has its loader.
        queue: what it was given to load.
        calls: references that wait for their answer.
    """

    actor: Any
    placed: bool = False
    started: bool = False
    queue: list[Lease] = field(default_factory=list)
    calls: set[Any] = field(default_factory=set)

    @property
    def has_room(self) -> bool:
        suspect = any(lease.load_suspect for lease in self.queue)
        return self.started and not suspect and len(self.queue) < CALLS_PER_ACTOR

    @property
    def releasable(self) -> bool:
        """It has a place, and nothing is lost with it."""
        return self.placed and not self.queue


@dataclass(slots=True, eq=False)
class VLMSlot:
    """A VLM actor; as `ReaderSlot`, but what it holds is the scheduler's to know, by its name."""

    name: str
    actor: Any
    placed: bool = False
    started: bool = False
    calls: set[Any] = field(default_factory=set)
    usage: WorkerUsage = field(default_factory=WorkerUsage)

    @property
    def releasable(self) -> bool:
        """It has a place; what it holds is begun again."""
        return self.placed


@dataclass(frozen=True, slots=True)
class PoolState:
    """How many actors of one kind there are.

    Attributes:
        num_placed: have a process somewhere, be it still loading its model.
        num_waiting: asked for and not placed.
        max_actors: that the job wants.
        num_started: are ready for work.
    """

    num_placed: int
    num_waiting: int
    max_actors: int
    num_started: int = 0

    @classmethod
    def of(cls, slots: Sequence[ReaderSlot | VLMSlot], max_actors: int) -> Self:
        """Count the slots of one kind."""
        num_placed, num_started = sum(slot.placed for slot in slots), sum(slot.started for slot in slots)
        return cls(num_placed, len(slots) - num_placed, max_actors, num_started)


@dataclass(frozen=True, slots=True)
class ScaleDecision:
    """What to do about one kind.

    Attributes:
        add: ask for so many more.
        cancel: so many of those that wait for a place.
        release: end one that has a place.
    """

    add: int = 0
    cancel: int = 0
    release: bool = False


class ActorPoolAutoscaler:
    """Decides how many readers and VLM actors are asked of the cluster, and what to say while too few are ready.

    Args:
        min_vlms: VLM actors without which the job gives up at last.
        now_s: as in its methods, on one clock.
    """

    def __init__(self, min_vlms: int, *, now_s: float) -> None:
        self._min_vlms = min_vlms
        self._both_placed_s = self._enough_s = self._said_s = now_s

    def decide(self, vlms: PoolState, readers: PoolState, *, now_s: float) -> tuple[ScaleDecision, ScaleDecision]:
        """What to do about the VLM actors, and about the readers."""
        if vlms.num_placed and readers.num_placed:
            self._both_placed_s = now_s
        release = now_s - self._both_placed_s >= RELEASE_AFTER_S
        return _decision(vlms, readers, release=release), _decision(readers, vlms, release=release)

    def released(self, *, now_s: float) -> None:
        """One was ended, as decided: the other kind has some time to take its place before the next one is."""
        self._both_placed_s = now_s

    def waiting_message(
        self, vlms: PoolState, readers: PoolState, *, resources: Callable[[], str], now_s: float
    ) -> str:
        """A line to print now and then while too few actors are ready, or "".

        Raises:
            ClusterError: too few were ready for `START_TIMEOUT_S`.
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
            f"{readers.num_started} readers stand; the cluster has {resources()}"
        )
        if waited_s >= START_TIMEOUT_S:
            raise ClusterError(f"{message}; lower runtime.gpus_per_actor, cpus_per_actor or num_vlm_actors.min")
        return message


def _decision(mine: PoolState, other: PoolState, *, release: bool) -> ScaleDecision:
    """What to do about one kind, given the other, without which it has no work.

    Args:
        release: one of the two has had no actor with a place for too long.
    """
    if not mine.num_placed:
        return ScaleDecision(cancel=mine.num_waiting - 1) if mine.num_waiting else ScaleDecision(add=1)
    if other.num_placed:
        return ScaleDecision(add=mine.max_actors - mine.num_placed - mine.num_waiting)
    return ScaleDecision(cancel=mine.num_waiting, release=release and mine.num_placed > 1)


class CircuitBreaker:
    """Counts deaths of one kind of actor; too many without a success between them end the job.

    Args:
        what: the kind, for the message.
        num_actors: that work at a time.
    """

    def __init__(self, what: str, num_actors: int) -> None:
        self._what, self._num_actors = what, num_actors
        self._in_a_row = self._starting_in_a_row = 0

    def record_success(self) -> None:
        """One of them finished something."""
        self._in_a_row = self._starting_in_a_row = 0

    def record_death(self, reason: Exception, *, while_starting: bool) -> None:
        """One of them died.

        Raises:
            ClusterError: one too many.
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

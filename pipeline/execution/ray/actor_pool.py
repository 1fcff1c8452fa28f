"""How many readers and VLM actors are asked of the cluster, and what to say while too few stand. Pure decisions.

Work starts with one of each kind; more are asked for only then, since on a small cluster the many of one kind would
take the place of the first of the other. What waits for a place starts when the cluster grows. Knows nothing of Ray,
items or clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import ClusterError

START_TIMEOUT_S = 1800.0
SAY_WAITING_EVERY_S = 30.0
# A cluster that lost the node of the only reader, and is full of VLM actors, never has a place for another one.
GIVE_UP_AFTER_S = 15.0


@dataclass(frozen=True, slots=True)
class Kind:
    """Actors of one kind.

    Attributes:
        num_placed: have a process somewhere, be it still loading its model.
        num_waiting: asked for and not placed.
        most: that the job wants.
    """

    num_placed: int
    num_waiting: int
    most: int


@dataclass(frozen=True, slots=True)
class Change:
    """What to do about one kind.

    Attributes:
        ask: for so many more.
        withdraw: so many of those that wait for a place.
        give_up: end one that has a place.
    """

    ask: int = 0
    withdraw: int = 0
    give_up: bool = False


def change(mine: Kind, other: Kind, *, lacking_s: float) -> Change:
    """What to do about one kind, given the other.

    Args:
        mine: the kind that is decided on.
        other: without which it has no work.
        lacking_s: for how long one of the two has had no actor with a place.
    """
    if not mine.num_placed:
        return Change(withdraw=mine.num_waiting - 1) if mine.num_waiting else Change(ask=1)
    if other.num_placed:
        return Change(ask=mine.most - mine.num_placed - mine.num_waiting)
    return Change(withdraw=mine.num_waiting, give_up=mine.num_placed > 1 and lacking_s >= GIVE_UP_AFTER_S)


class Patience:
    """Says now and then that too few actors stand; gives up when it lasts."""

    def __init__(self, fewest_vlms: int, *, now_s: float) -> None:
        self._fewest_vlms = fewest_vlms
        self._short_since_s = self._said_s = now_s

    def check(self, num_vlms: int, num_readers: int, *, resources: Callable[[], str], now_s: float) -> str:
        """A line to print, or "".

        Raises:
            ClusterError: too few stood for `START_TIMEOUT_S`.
        """
        if num_vlms >= self._fewest_vlms and num_readers:
            self._short_since_s = self._said_s = now_s
            return ""
        waited_s = now_s - self._short_since_s
        if waited_s < START_TIMEOUT_S and now_s - self._said_s < SAY_WAITING_EVERY_S:
            return ""
        self._said_s = now_s
        message = (
            f"waiting for actors for {waited_s:.0f} s: {num_vlms} VLM actors of at least {self._fewest_vlms} and "
            f"{num_readers} readers stand; the cluster has {resources()}"
        )
        if waited_s >= START_TIMEOUT_S:
            raise ClusterError(f"{message}; lower runtime.gpus_per_actor, cpus_per_actor or num_vlm_actors.min")
        return message

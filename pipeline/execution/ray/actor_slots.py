"""What the driver keeps of each actor that it asked for. Plain state; `pipeline.execution.ray.executor` changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.execution.lease import Lease
from pipeline.execution.ray.actor_pool import Kind
from pipeline.execution.worker import WorkerUsage

CALLS_PER_ACTOR = 2


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


@dataclass(slots=True, eq=False)
class VLMSlot:
    """A VLM actor; as `ReaderSlot`, but what it holds is the scheduler's to know, by its name."""

    name: str
    actor: Any
    placed: bool = False
    started: bool = False
    calls: set[Any] = field(default_factory=set)
    usage: WorkerUsage = field(default_factory=WorkerUsage)


def kind_of(slots: Sequence[ReaderSlot | VLMSlot], most: int) -> Kind:
    """How many of them have a place."""
    num_placed = sum(slot.placed for slot in slots)
    return Kind(num_placed, len(slots) - num_placed, most)

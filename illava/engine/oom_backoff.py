"""Makes a model's running batch smaller when it runs out of memory, until every request is answered.

It knows a model by `submit`, `step` and `cancel_all` alone, so any engine of that interface can be backed off.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from illava.errors import RequestError, is_out_of_memory
from illava.requests import Generation

if TYPE_CHECKING:
    from illava.plan import ReductionPlan
    from illava.requests import Request


class StepEngine(Protocol):
    """Answers requests step by step: a `VLM`, or its engine."""

    @property
    def has_work(self) -> bool: ...

    @property
    def device_busy_s(self) -> float: ...

    def submit(self, request: Request, *, plan: ReductionPlan) -> None: ...

    def step(self) -> list[Generation]: ...

    def cancel_all(self) -> list[str]: ...


@dataclass(slots=True)
class _Entry:
    """A request that was accepted and not yet returned; `entered_s` is the time it last entered the model."""

    request: Request
    accepted_s: float = field(default_factory=time.perf_counter)
    entered_s: float = 0.0

    def failed(self, error: Exception) -> Generation:
        """End the request with an error; all its time was a wait for the model."""
        return Generation.failed(self.request.request_id, error, queue_s=self.entered_s - self.accepted_s)


class OOMBackoff:
    """Passes requests to one model, no more at a time than fit into its memory so far.

    When a step runs out of memory, the class takes every request out of the model, halves the number that may be
    inside, and begins those requests again; the same seeds draw the same answers. The lower limit stays, unless a
    request that does not even fit alone had caused it: that request ends with a `MemoryError`, and the former limit is
    restored.

    Args:
        vlm: the model; nobody else submits to it.
        plan: the plan of every request.

    Attributes:
        limit: most requests inside the model; None where no step ran out of memory yet.
        wasted_s: seconds of steps whose requests had to begin again.
    """

    def __init__(self, vlm: StepEngine, plan: ReductionPlan) -> None:
        self._vlm, self._plan = vlm, plan
        self.limit: int | None = None
        self.wasted_s = 0.0
        self._inside: dict[str, _Entry] = {}
        self._outside: deque[_Entry] = deque()
        self._limit_before: int | None = None
        self._did_not_fit: set[str] = set()  # requests of the batch that lowered the limit, not answered yet
        self._answered_s = self._dropped_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._outside) or self._vlm.has_work

    @property
    def busy_s(self) -> float:
        """Device seconds of requests that are answered or in flight; `wasted_s` has those of dropped requests."""
        return self._vlm.device_busy_s - self._dropped_s

    def submit(self, request: Request) -> None:
        """Take a request. An error of the model's `submit` is raised; while the model is full it comes as an answer."""
        entry = _Entry(request)
        if self._outside or not self._has_room:
            self._outside.append(entry)
        else:
            self._enter(entry)

    def step(self) -> list[Generation]:
        """Advance the batch by one step; returns the requests that ended.

        Raises:
            Exception: any error of the model but running out of memory.
        """
        refused = self._fill()
        began_s, busy_s = time.perf_counter(), self._vlm.device_busy_s
        try:
            ended = self._vlm.step() if self._vlm.has_work else []
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        else:
            return refused + [self._settle(generation) for generation in ended]
        # Outside the except block, where the traceback would keep the step's tensors in memory.
        failed_s = time.perf_counter() - began_s - (self._vlm.device_busy_s - busy_s)
        return refused + self._shrink(reason, failed_s)

    def reset(self) -> None:
        """Forget every request. Restore the former limit if one of them alone may have lowered it."""
        self._drop(0.0)
        self._outside.clear()
        if self._did_not_fit:
            self.limit, self._did_not_fit = self._limit_before, set()

    @property
    def _has_room(self) -> bool:
        return self.limit is None or len(self._inside) < self.limit

    def _enter(self, entry: _Entry) -> None:
        self._vlm.submit(entry.request, plan=self._plan)
        entry.entered_s = time.perf_counter()
        self._inside[entry.request.request_id] = entry

    def _fill(self) -> list[Generation]:
        refused = []
        while self._outside and self._has_room:
            entry = self._outside.popleft()
            try:
                self._enter(entry)
            except RequestError as error:
                entry.entered_s = time.perf_counter()
                refused.append(entry.failed(error))
        return refused

    def _settle(self, generation: Generation) -> Generation:
        entry = self._inside.pop(generation.request_id)
        self._did_not_fit.discard(generation.request_id)
        self._answered_s += generation.timing.device_s
        waited_s, timing = entry.entered_s - entry.accepted_s, generation.timing
        return replace(generation, timing=replace(timing, queue_s=timing.queue_s + waited_s))

    def _shrink(self, reason: str, failed_s: float) -> list[Generation]:
        dropped = self._drop(failed_s)
        if len(dropped) > 1:
            if not self._did_not_fit:
                self._limit_before, self._did_not_fit = (
                    self.limit,
                    {entry.request.request_id for entry in dropped},
                )
            self.limit = len(dropped) // 2
            self._outside.extendleft(reversed(dropped))
            return []
        [alone] = dropped
        if alone.request.request_id in self._did_not_fit:
            self.limit, self._did_not_fit = self._limit_before, set()
        alone.entered_s = time.perf_counter()
        return [alone.failed(MemoryError(f"too large for the device even alone: {reason}"))]

    def _drop(self, failed_s: float) -> list[_Entry]:
        """Take every request out of the model; count the device time spent on them as wasted."""
        self._vlm.cancel_all()
        dropped_s = self._vlm.device_busy_s - self._answered_s - self._dropped_s
        self._dropped_s += dropped_s
        self.wasted_s += dropped_s + failed_s
        dropped = list(self._inside.values())
        self._inside.clear()
        return dropped

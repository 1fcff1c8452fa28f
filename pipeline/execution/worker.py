"""Turns loaded items into rows through one model's running batch (`VLMWorker`).

A plain class without Ray, so that tests can run it alone. An error of one item becomes that item's row. Any other error
ends the worker, and the executor decides what follows.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from illava.engine.oom_backoff import OOMBackoff
from illava.errors import RequestError
from illava.requests import Generation, Request
from pipeline.config.placement import gpus_of, place_here
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError
from pipeline.execution.item_timing import ItemTimeline
from pipeline.execution.rows import RowMaker, RunInfo, of_two_tries
from pipeline.faults import fault_point
from pipeline.records import LoadedItem, ResultRow
from pipeline.runs.config_fingerprint import resolve_dtype
from pipeline.tasks.asking import history_of, request_of
from pipeline.tasks.build import build_task
from pipeline.tasks.sampling import after_a_loop, sampling_params

if TYPE_CHECKING:
    from illava import VLM
    from illava.preprocess import VisualInput


@dataclass(frozen=True, slots=True)
class Outcome:
    """Holds a row, and since when the worker had its item.

    Attributes:
        row: its ``latency_s`` and ``queue_s`` cover the worker's part only.
        taken_s: when the worker took the item over, on the worker's clock.
    """

    row: ResultRow
    taken_s: float


@dataclass(slots=True)
class _Taken:
    """Tracks an item on its way through the model, request by request.

    Attributes:
        asked: the request in the model.
        looped: its first answer, where that was a loop and the request is tried again.
    """

    loaded: LoadedItem
    attempts: int
    shard_index: int
    contents: deque[tuple[str | VisualInput, ...]]
    generations: list[Generation] = field(default_factory=list)
    asked: Request | None = None
    looped: Generation | None = None
    timeline: ItemTimeline = field(init=False)


@dataclass(frozen=True, slots=True)
class WorkerUsage:
    """Splits the wall time of a worker since it was made. Idle time is measured in the gaps, not taken as the rest.

    Attributes:
        wall_s: time since construction began.
        start_s: time of loading the model, and of warming it up where `VLMWorker.warm_up_first` asked for it.
        busy_s: device time of all steps that led to an answer.
        idle_s: time between steps, time within a step beyond the device's own, and time of batches that ran out of
            memory and were started again.
    """

    wall_s: float = 0.0
    start_s: float = 0.0
    busy_s: float = 0.0
    idle_s: float = 0.0


class VLMWorker:
    """Holds one model and its running batch.

    Args:
        config: the job.
        run_info: names the run in the rows.
        vlm: a loaded model; by default the worker loads the one that the configuration names.
    """

    def __init__(self, config: JobConfig, run_info: RunInfo, *, vlm: VLM | None = None) -> None:
        self._born_s = time.perf_counter()
        self._config = config
        self._task = build_task(config.task)
        self._rows = RowMaker(config, run_info)
        self._batch = OOMBackoff(vlm if vlm is not None else load_vlm(config), config.reduction)
        self._taken: dict[str, _Taken] = {}
        self._refused: list[Generation] = []
        self._start_s = time.perf_counter() - self._born_s
        self._idle_s = 0.0
        self._idle_since_s = time.perf_counter()
        self._warms_up, self._warm_busy_s = False, 0.0

    def warm_up_first(self) -> None:
        """Answer the first item's first request once more, before it is taken over: a model's first steps take longer.

        For measurements: that time, and the wait for the item, count as the worker's start, and no row has them.
        """
        self._warms_up = True

    @property
    def pending(self) -> int:
        """Number of items whose rows have not been returned yet."""
        return len(self._taken)

    def add(self, loaded: LoadedItem, *, attempts: int, shard_index: int) -> None:
        """Take an item over; a later `step` returns its row, also where the model refuses the item.

        Raises:
            PlanError: the reduction plan does not fit this model, so that no item can be processed.
        """
        contents = deque(self._task.requests(loaded.item, loaded.media))
        if self._warms_up:
            self._warms_up = False
            self._warm_up(loaded, contents[0])
        taken = _Taken(loaded, attempts, shard_index, contents)
        self._submit_next(taken)
        # The timeline begins after submit, where the request's own clock starts; the time before is the driver's wait.
        taken.timeline = ItemTimeline()
        self._taken[loaded.item.item_id] = taken

    def step(self) -> list[Outcome]:
        """Advance the batch by one step; return the rows of the items that ended in it."""
        if self._taken:
            fault_point("batch")
        begin_s = time.perf_counter()
        self._idle_s += begin_s - self._idle_since_s
        accounted_s = self._batch.busy_s + self._batch.wasted_s
        generations = self._batch.step() if self._batch.has_work else []
        generations, self._refused = self._refused + generations, []
        self._idle_since_s = time.perf_counter()
        in_device_s = self._batch.busy_s + self._batch.wasted_s - accounted_s
        self._idle_s += max(0.0, self._idle_since_s - begin_s - in_device_s)
        ended = []
        for generation in generations:
            taken = self._taken[generation.request_id]
            taken.timeline.answered(generation, step_end_s=self._idle_since_s)
            if self._tries_again(taken, generation):
                taken.timeline.dispatched()
                continue
            taken.generations.append(generation if taken.looped is None else of_two_tries(taken.looped, generation))
            taken.looped = None
            if taken.contents:
                self._submit_next(taken)
                taken.timeline.dispatched()
            else:
                ended.append(self._taken.pop(generation.request_id))
        return [self._outcome(taken) for taken in ended]

    def usage(self) -> WorkerUsage:
        """Return where the wall time went so far."""
        now_s = time.perf_counter()
        idle_s = self._idle_s + now_s - self._idle_since_s + self._batch.wasted_s
        return WorkerUsage(now_s - self._born_s, self._start_s, self._batch.busy_s - self._warm_busy_s, idle_s)

    def reset(self) -> None:
        """Drop every item; none of them gets a row from this worker."""
        self._batch.reset()
        self._refused.clear()
        self._taken.clear()

    def _warm_up(self, loaded: LoadedItem, content: tuple[str | VisualInput, ...]) -> None:
        item, busy_s = loaded.item, self._batch.busy_s
        sampling = sampling_params(self._config.sampling, seed=self._config.seed, choices=self._task.choices(item))
        with suppress(RequestError):  # the item's row will say it
            self._batch.submit(Request(item.item_id, content, sampling))
            while self._batch.has_work:
                self._batch.step()
        self._warm_busy_s = self._batch.busy_s - busy_s
        now_s = time.perf_counter()
        self._start_s += now_s - self._idle_since_s
        self._idle_since_s = now_s

    def _submit_next(self, taken: _Taken) -> None:
        """Submit an item's next request."""
        item = taken.loaded.item
        seed = self._config.seed + len(taken.generations)  # each request has a seed of its own
        sampling = sampling_params(
            self._config.sampling, seed=seed, choices=self._task.choices(item), json_schema=self._task.json_schema
        )
        self._submit(taken, request_of(self._config.task, item.item_id, taken.contents.popleft(), sampling))

    def _tries_again(self, taken: _Taken, generation: Generation) -> bool:
        """Submit a request once more whose answer is a loop, where the job says so."""
        looped = generation.finish_reason == "loop" and self._config.sampling.on_loop == "retry"
        if not looped or taken.looped is not None or taken.asked is None:
            return False
        taken.looped = generation
        taken.attempts += 1
        self._submit(taken, replace(taken.asked, sampling=after_a_loop(taken.asked.sampling)))
        return True

    def _submit(self, taken: _Taken, request: Request) -> None:
        taken.asked = request
        try:
            self._batch.submit(request)
        except RequestError as error:
            self._refused.append(Generation.failed(request.request_id, error))

    def _outcome(self, taken: _Taken) -> Outcome:
        row = self._rows.answered(
            taken.loaded, taken.generations, attempts=taken.attempts, shard_index=taken.shard_index
        )
        return Outcome(taken.timeline.written_to(row), taken.timeline.began_s)


def load_vlm(config: JobConfig) -> VLM:
    """Load the model that a job names on the device it names, with as many threads as its actor has cores.

    Raises:
        ConfigError, DeviceError: this process has no such device; raised before anything is loaded.
        ConfigError: the model's chat template cannot render the conversation that the job describes.
        ModelLoadError: as `VLM.from_pretrained`.
    """
    config = place_here(config)
    import torch

    from illava import VLM

    # More threads than cores stall each other. The number of threads also moves last digits, so the job sets it.
    torch.set_num_threads(max(1, int(config.runtime.cpus_per_actor)))
    model, gpus = config.model, gpus_of(config)
    vlm = VLM.from_pretrained(
        model.model_id,
        revision=model.revision,
        dtype=resolve_dtype(config),
        device=model.device,
        kv_cache_bytes=model.kv_cache_bytes,
        max_batch_requests=model.max_batch_requests,
        gpu_share=gpus if 0 < gpus < 1 else 1.0,  # of several actors on one GPU each takes its own share
        pixel_limits=config.media.pixel_limits,
    )
    try:
        vlm.family.check_conversation(history_of(config.task), config.task.template_args or {})
    except RequestError as error:
        raise ConfigError(f"task: {error}") from error
    return vlm

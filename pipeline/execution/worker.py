"""Turns loaded items into rows through one model's running batch (`VLMWorker`).

A plain class without Ray, so that tests can run it alone. An error of one item becomes that item's row. Any other error
ends the worker, and the executor decides what follows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from illava.engine.oom_backoff import OOMBackoff
from illava.errors import RequestError
from illava.families.adapters import Adapter
from illava.requests import Generation, Request, SamplingParams
from pipeline.config.placement import gpus_of, place_here
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError
from pipeline.execution.item_timing import ItemTimeline
from pipeline.execution.passes import Passes
from pipeline.execution.rows import RowMaker, RunInfo
from pipeline.faults import fault_point
from pipeline.records import LoadedItem, MediaItem, ResultRow
from pipeline.runs.config_fingerprint import resolve_dtype
from pipeline.tasks.asking import conversation_of, request_of
from pipeline.tasks.build import build_task
from pipeline.tasks.sampling import sampling_params

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
    """Tracks an item on its way through the model, turn by turn.

    Attributes:
        passes: the turn that is being asked.
        generations, candidates, drafts: of the turns that ended.
    """

    loaded: LoadedItem
    attempts: int
    shard_index: int
    contents: deque[tuple[str | VisualInput, ...]]
    passes: Passes = field(init=False)
    generations: list[Generation] = field(default_factory=list)
    candidates: list[tuple[str, ...]] = field(default_factory=list)
    drafts: list[tuple[str, ...]] = field(default_factory=list)
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
        self._asked: dict[str, _Taken] = {}  # by the ids of the requests in the model
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
        self._submit(taken, self._next_turn(taken))
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
            taken = self._asked.pop(generation.request_id)
            further = taken.passes.take(generation)
            taken.attempts += taken.passes.pop_retries()
            goes_on = len(taken.passes.in_flight) > len(further)  # other answers of the turn are being drawn
            if not goes_on:
                taken.timeline.answered(generation, step_end_s=self._idle_since_s)
            if not further and not goes_on:
                self._end_turn(taken)
                if not taken.contents:
                    ended.append(self._taken.pop(taken.loaded.item.item_id))
                    continue
                further = self._next_turn(taken)
            self._submit(taken, further)
            if not goes_on:
                taken.timeline.dispatched()
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
        self._asked.clear()

    def _warm_up(self, loaded: LoadedItem, content: tuple[str | VisualInput, ...]) -> None:
        item, busy_s = loaded.item, self._batch.busy_s
        with suppress(RequestError):  # the item's row will say it
            self._batch.submit(request_of(self._config.task, item.item_id, content, self._sampling(item, 0)))
            while self._batch.has_work:
                self._batch.step()
        self._warm_busy_s = self._batch.busy_s - busy_s
        now_s = time.perf_counter()
        self._start_s += now_s - self._idle_since_s
        self._idle_since_s = now_s

    def _next_turn(self, taken: _Taken) -> list[Request]:
        """Begin an item's next turn; returns its requests."""
        item = taken.loaded.item
        sampling = self._sampling(item, len(taken.generations))
        taken.passes = Passes(self._config, item.item_id, taken.contents.popleft(), sampling)
        return taken.passes.in_flight

    def _sampling(self, item: MediaItem, number: int) -> SamplingParams:
        """What the item's turn of this number is drawn by; each turn has a seed of its own."""
        return sampling_params(
            self._config.sampling,
            seed=self._config.seed + number,
            choices=self._task.choices(item),
            json_schema=self._task.json_schema,
        )

    def _end_turn(self, taken: _Taken) -> None:
        generation, candidates, drafts = taken.passes.result()
        taken.generations.append(generation)
        taken.candidates.append(candidates)
        taken.drafts.append(drafts)

    def _submit(self, taken: _Taken, requests: Sequence[Request]) -> None:
        for request in requests:
            self._asked[request.request_id] = taken
            try:
                self._batch.submit(request)
            except RequestError as error:
                self._refused.append(Generation.failed(request.request_id, error))

    def _outcome(self, taken: _Taken) -> Outcome:
        row = self._rows.answered(
            taken.loaded,
            taken.generations,
            attempts=taken.attempts,
            shard_index=taken.shard_index,
            candidates=taken.candidates,
            drafts=taken.drafts,
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
        revision=model.hub_revision,
        dtype=resolve_dtype(config),
        device=model.device,
        kv_cache_bytes=model.kv_cache_bytes,
        max_batch_requests=model.max_batch_requests,
        gpu_share=gpus if 0 < gpus < 1 else 1.0,  # of several actors on one GPU each takes its own share
        pixel_limits=config.media.pixel_limits,
        quantization=model.quantization,
        adapter=None if (found := model.adapter) is None else Adapter(found.id, found.revision, found.merge),
    )
    try:
        vlm.family.check_conversation(conversation_of(config.task), config.task.template_args or {})
    except RequestError as error:
        raise ConfigError(f"task: {error}") from error
    return vlm

"""Defines the ``runtime`` section of a job: how much machinery runs, and when it gives up."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from pipeline.config.base import Section, runtime_field


class ActorRange(Section):
    """Sets the least and the largest number of actors.

    Attributes:
        min: fewer than this for half an hour end the job; it works with however many stand meanwhile.
        max: asked of the cluster.
    """

    min: int = runtime_field(1, ge=1)
    max: int = runtime_field(1, ge=1)

    @model_validator(mode="after")
    def _is_a_range(self) -> ActorRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}: raise max or lower min")
        return self


class RuntimeConfig(Section):
    """Says how much machinery runs.

    Changes no row, but for the last bits that devices, batch composition and threads move.

    Attributes:
        executor: ``ray``, or ``local``: one process, for tests and debugging.
        num_vlm_actors: actors that hold a model.
        gpus_per_actor: ``auto`` is 1 where the Ray cluster (for the local executor: this process) has a GPU and
            ``model.device`` is not cpu, else 0. Up to 1 it may be a fraction; 0 runs the model on CPU.
        cpus_per_actor: CPU cores reserved, and torch threads used, by each VLM actor.
        num_reader_actors: processes that fetch and load media.
        max_inflight_bytes: loaded frames waiting anywhere, at most. They lie in Ray's object store; beside them each
            reader and the driver hold at most `READER_AND_DRIVER_BYTES` and three times the largest item, however
            slow the model is.
        max_attempts: tries an item has before it becomes a failed row.
        max_failed: the command stops once more of its items failed: a count, or a share of the run's items below 1;
            null for no limit.
        item_timeout_s: an item that its VLM actor has held for so long ends the actor; each item it held is started
            again alone, and one that does not come back then is a failed row ``item_timeout``. The local executor
            looks between two steps of the batch: a step that never returns is seen on Ray only.
        max_open_shards: shards in work at once; bounds what a crash can cost.
        cache_dir: local staging of fetched objects; null is a temporary folder.
        cache_bytes: of all readers' staging together, shared out equally; an object that is larger than a reader's
            share, and not read by ranges, is a failed row ``too_large``, however large ``media.max_bytes`` is.
    """

    executor: Literal["ray", "local"] = runtime_field("ray")
    num_vlm_actors: ActorRange = runtime_field(ActorRange())
    gpus_per_actor: float | Literal["auto"] = runtime_field("auto")
    cpus_per_actor: float = runtime_field(1.0, ge=0)
    num_reader_actors: int = runtime_field(2, ge=1)
    max_inflight_bytes: int = runtime_field(4_000_000_000, ge=1)
    max_attempts: int = runtime_field(3, ge=1)
    max_failed: int | float | None = runtime_field(None)
    item_timeout_s: float = runtime_field(1800.0, gt=0)
    max_open_shards: int = runtime_field(4, ge=1)
    cache_dir: str | None = runtime_field(None)
    cache_bytes: int = runtime_field(20_000_000_000, ge=1)

    @field_validator("gpus_per_actor", mode="before")
    @classmethod
    def _are_gpus(cls, count: Any) -> Any:
        is_number = isinstance(count, (int, float)) and not isinstance(count, bool)
        if count != "auto" and not (is_number and (0 <= count <= 1 or (count > 1 and float(count).is_integer()))):
            raise ValueError("auto, a number from 0 to 1, or a whole number above it")
        return count

    @field_validator("max_failed", mode="before")
    @classmethod
    def _is_a_count_or_a_share(cls, most: Any) -> Any:
        is_number = isinstance(most, (int, float)) and not isinstance(most, bool)
        if most is not None and not (is_number and (0 < most < 1 or (most >= 0 and float(most).is_integer()))):
            raise ValueError("a count such as 100, a share above 0 and below 1 such as 0.05, or null")
        return int(most) if is_number and float(most).is_integer() else most

    @property
    def reader_cache_bytes(self) -> int:
        """One reader's share of `cache_bytes`."""
        return self.cache_bytes // self.num_reader_actors

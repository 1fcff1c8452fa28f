"""Computes what items and runs cost, at the prices in the config. Pure arithmetic; measures nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

from pipeline.config.placement import gpus_of
from pipeline.config.schema import JobConfig, PricesConfig

_SECONDS_PER_HOUR = 3600.0


def item_cost_usd(
    prices: PricesConfig,
    *,
    gpu_s: float,
    cpu_s: float,
    storage_requests: int = 0,
    gpus_per_actor: float = 1.0,
    cpus_per_actor: float = 0.0,
) -> float:
    """Return the cost of one item: its device seconds, its reader's CPU seconds, its requests to the store.

    Args:
        prices: per hour and per request.
        gpu_s: the item's share of an actor's device time.
        cpu_s: CPU seconds of reader and child.
        storage_requests: requests made for it.
        gpus_per_actor: GPUs the actor holds during a device second; 0 where the model runs on CPU.
        cpus_per_actor: cores the actor holds during a device second.
    """
    actor_s_usd = (gpus_per_actor * prices.gpu_hour_usd + cpus_per_actor * prices.cpu_hour_usd) / _SECONDS_PER_HOUR
    cpu_s_usd = prices.cpu_hour_usd / _SECONDS_PER_HOUR
    return gpu_s * actor_s_usd + cpu_s * cpu_s_usd + storage_requests * prices.storage_request_usd


@dataclass(frozen=True, slots=True)
class Spending:
    """Holds what a session, or all sessions of a run together, used and paid.

    Attributes:
        wall_s: of the commands, listing the input excluded.
        actor_s: VLM actors' wall time, from loading their model on.
        load_s, idle_s: parts of it: loading models; standing without work.
        reader_cpu_s: CPU seconds of readers and their children, failed and repeated loads included.
        storage_requests: readers' requests to the store, likewise.
        total_usd: all of the above at the session's prices.
        idle_usd, load_usd: the parts of it that no row carries.
    """

    wall_s: float = 0.0
    actor_s: float = 0.0
    load_s: float = 0.0
    idle_s: float = 0.0
    reader_cpu_s: float = 0.0
    storage_requests: int = 0
    total_usd: float = 0.0
    idle_usd: float = 0.0
    load_usd: float = 0.0

    def __add__(self, other: Self) -> Self:
        names = [field.name for field in fields(self)]
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in names})


def spending(
    config: JobConfig,
    *,
    wall_s: float,
    actor_s: float,
    load_s: float,
    idle_s: float,
    reader_cpu_s: float,
    storage_requests: int,
) -> Spending:
    """Price a session by the config, from what its actors and readers measured themselves."""
    readers_usd = item_cost_usd(config.prices, gpu_s=0.0, cpu_s=reader_cpu_s, storage_requests=storage_requests)
    return Spending(
        wall_s=wall_s,
        actor_s=actor_s,
        load_s=load_s,
        idle_s=idle_s,
        reader_cpu_s=reader_cpu_s,
        storage_requests=storage_requests,
        total_usd=actors_usd(config, actor_s) + readers_usd,
        idle_usd=actors_usd(config, idle_s),
        load_usd=actors_usd(config, load_s),
    )


@dataclass(frozen=True, slots=True)
class RunCost:
    """Says where money went.

    Attributes:
        total_usd: measured by itself: actors' wall time, readers' CPU seconds, requests; not the sum of the parts.
        items_usd: of all rows, as in their ``cost_usd``.
        idle_usd: actors that stood without work.
        load_usd: actors that loaded their model.
    """

    total_usd: float
    items_usd: float
    idle_usd: float
    load_usd: float

    @property
    def lost_usd(self) -> float:
        """What was paid and is in no row.

        That is work of actors that died, shards not published when a session ended, rows that a retry replaced, and
        loads that were repeated. Without such faults it is zero within 0.1 % of the total.
        """
        return self.total_usd - self.items_usd - self.idle_usd - self.load_usd

    def per_item_usd(self, num_items: int) -> float:
        """The whole cost by item, idle and load time included; 0 for no items."""
        return self.total_usd / num_items if num_items else 0.0


def run_cost(spent: Spending, items_usd: float) -> RunCost:
    """Return the cost of one session or of all, whose rows' costs sum to ``items_usd``."""
    return RunCost(spent.total_usd, items_usd, spent.idle_usd, spent.load_usd)


def actors_usd(config: JobConfig, seconds: float) -> float:
    """Price so many seconds of one VLM actor, whatever it does; the job's devices are chosen."""
    return item_cost_usd(
        config.prices,
        gpu_s=seconds,
        cpu_s=0.0,
        gpus_per_actor=gpus_of(config),
        cpus_per_actor=config.runtime.cpus_per_actor,
    )

"""What items and runs cost, at the prices in the config. Pure arithmetic; measures nothing."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import JobConfig, PricesConfig

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
    """The cost of one item: its device seconds, its reader's CPU seconds, its requests to the store.

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
class RunCost:
    """Where a run's money went; the parts sum to the whole.

    Attributes:
        items_usd: of all rows, as in their ``cost_usd``.
        idle_usd: actors that stood without work.
        load_usd: actors that loaded their model.
    """

    items_usd: float
    idle_usd: float
    load_usd: float

    @property
    def total_usd(self) -> float:
        return self.items_usd + self.idle_usd + self.load_usd

    def per_item_usd(self, num_items: int) -> float:
        """The whole run's cost, idle and load time included, by item; 0 for no items."""
        return self.total_usd / num_items if num_items else 0.0


def run_cost(config: JobConfig, *, items_usd: float, idle_s: float, load_s: float) -> RunCost:
    """A run's cost from the sum of its rows' costs and its actors' idle and load seconds (measured as gaps)."""
    return RunCost(items_usd, actors_usd(config, idle_s), actors_usd(config, load_s))


def actors_usd(config: JobConfig, seconds: float) -> float:
    """What VLM actors cost in so many seconds of one of them, whatever they do."""
    return item_cost_usd(
        config.prices,
        gpu_s=seconds,
        cpu_s=0.0,
        gpus_per_actor=config.runtime.gpus_per_actor,
        cpus_per_actor=config.runtime.cpus_per_actor,
    )

"""Decides when a job with `--budget 25USD` or `--budget 3h` must open no further shard.

Open shards are finished, since their actors are paid for already. The guard therefore estimates, from the rate so far,
what finishing them will cost.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Literal

from pipeline.config.schema import JobConfig, PricesConfig
from pipeline.cost import actors_usd
from pipeline.errors import ConfigError
from pipeline.execution.summary import RunStats

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LIMIT = re.compile(r"(\d+(?:\.\d+)?)\s*(usd|s|m|h|d)", re.IGNORECASE)
_MIN_ROWS = 8  # fewer rows give no rate

BUDGET_EXIT_CODE = 6


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits the money or the wall time of one command.

    Attributes:
        limit: the amount, in ``unit``.
        unit: ``usd``, or ``s`` for seconds.
    """

    limit: float
    unit: Literal["usd", "s"]


class BudgetGuard:
    """Decides whether a running command may open another shard.

    Open shards are finished. A budget for fewer than ``max_open_shards * items_per_shard`` items is therefore exceeded.
    The guard estimates money from above: it charges every VLM actor that may exist from the start, whether the actor
    works, loads or waits. The rows bring the CPU seconds of the readers and the storage requests.

    Args:
        config: holds the prices and the number of actors.
        budget: the limit; None allows everything.
        stats: sums over the rows so far; the caller updates them.
    """

    def __init__(self, config: JobConfig, budget: Budget | None, stats: RunStats) -> None:
        self._config, self._budget, self._stats = config, budget, stats
        self._began_s = time.monotonic()
        self._spent_at_first_row: float | None = None

    def allows_more(self, num_in_work: int) -> bool:
        """Say whether the budget has room for more than finishing the ``num_in_work`` items of the open shards.

        The cost of finishing them is estimated from the cost per row so far.
        """
        if self._budget is None:
            return True
        spent, num_rows = self._spent(self._budget), self._stats.num_rows
        if num_rows and self._spent_at_first_row is None:
            self._spent_at_first_row = spent
        if self._spent_at_first_row is None or num_rows < _MIN_ROWS:
            return spent < self._budget.limit
        rate = (spent - self._spent_at_first_row) / (num_rows - 1)
        return spent + rate * num_in_work < self._budget.limit

    def _spent(self, budget: Budget) -> float:
        """Return what was spent so far, in the budget's unit.

        The actors' wall time pays for the device seconds of the rows, so these are not counted again.
        """
        wall_s = time.monotonic() - self._began_s
        if budget.unit == "s":
            return wall_s
        actor_s = wall_s * self._config.runtime.num_vlm_actors.max
        return actors_usd(self._config, actor_s - self._stats.gpu_s) + self._stats.cost_usd


def parse_budget(text: str, config: JobConfig) -> Budget:
    """Read the budget of a command line.

    Raises:
        ConfigError: the text is no amount, or names money where no prices are set.
    """
    found = _LIMIT.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"--budget {text!r}: give money such as 25USD, or time such as 90m, 3h or 2d")
    unit = found[2].lower()
    if unit != "usd":
        return Budget(float(found[1]) * _SECONDS[unit], "s")
    if config.prices == PricesConfig():
        raise ConfigError(
            f"--budget {text}: no prices are set; set prices.gpu_hour_usd or prices.cpu_hour_usd, or give a time"
        )
    return Budget(float(found[1]), "usd")

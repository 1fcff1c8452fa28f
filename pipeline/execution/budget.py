"""`--budget 25USD` or `3h`: when a job must begin nothing new.

What is begun is finished, for it is paid for already; so the end is foreseen from the rate so far.
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
_MIN_ROWS = 8  # before that the rate says nothing


BUDGET_EXIT_CODE = 6


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit in money or in wall time of one command.

    Attributes:
        limit: in ``unit``.
        unit: ``usd``, or ``s`` for seconds.
    """

    limit: float
    unit: Literal["usd", "s"]


class BudgetGuard:
    """Whether a running command may begin another shard.

    What is begun is finished, so a budget for fewer than ``max_open_shards * items_per_shard`` items is overshot. Money
    is counted from above: every VLM actor that may exist is paid for from the start on, whether it works, loads or
    waits; readers' CPU seconds and storage requests are the rows' own.

    Args:
        config: prices and actors.
        budget: None allows everything.
        tally: of the rows so far, fed by others.
    """

    def __init__(self, config: JobConfig, budget: Budget | None, tally: RunStats) -> None:
        self._config, self._budget, self._tally = config, budget, tally
        self._began_s = time.monotonic()
        self._spent_at_first_row: float | None = None

    def more(self, num_in_work: int) -> bool:
        """False once what is spent, and what finishing ``num_in_work`` items will take at the rate so far, is all."""
        if self._budget is None:
            return True
        spent, num_rows = self._spent(self._budget), self._tally.num_rows
        if num_rows and self._spent_at_first_row is None:
            self._spent_at_first_row = spent
        if self._spent_at_first_row is None or num_rows < _MIN_ROWS:
            return spent < self._budget.limit
        rate = (spent - self._spent_at_first_row) / (num_rows - 1)
        return spent + rate * num_in_work < self._budget.limit

    def _spent(self, budget: Budget) -> float:
        """So far, in the budget's unit; the rows' device seconds, paid with the actors, are not paid twice."""
        wall_s = time.monotonic() - self._began_s
        if budget.unit == "s":
            return wall_s
        standing_s = wall_s * self._config.runtime.num_vlm_actors.max
        return actors_usd(self._config, standing_s - self._tally.gpu_s) + self._tally.cost_usd


def parse_budget(text: str, config: JobConfig) -> Budget:
    """The budget a command line names.

    Raises:
        ConfigError: not an amount, or money without prices.
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

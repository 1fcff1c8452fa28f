"""Decides when a job with `--budget 25USD` or `--budget 3h/run` must open no further shard.

A budget is of one command, or with ``/run`` of the whole run: of all commands that have begun on its folder, those that
were killed and those that are at work now included. Open shards are finished, since their actors are paid for already.
The guard therefore estimates, from the rate so far, what finishing them will cost.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.config.schema import JobConfig, PricesConfig
from pipeline.cost import Spending, actors_usd
from pipeline.errors import ConfigError
from pipeline.execution.reporting.summary import RunStats
from pipeline.runs.sessions import Session, SessionSpending, other_sessions

logger = logging.getLogger(__name__)
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LIMIT = re.compile(r"(\d+(?:\.\d+)?)\s*(usd|s|m|h|d)(?:\s*/\s*(run|command))?", re.IGNORECASE)
_MIN_ROWS = 8  # fewer rows give no rate
LOOK_EVERY_S = 30.0  # how often a session notes what it has spent, and looks what others have

BUDGET_EXIT_CODE = 6


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits the money or the wall time of one command, or of a whole run.

    Attributes:
        limit: the amount, in ``unit``.
        unit: ``usd``, or ``s`` for seconds.
        of: ``command``: what this command spends. ``run``: what all commands on the run's folder spend together.
    """

    limit: float
    unit: Literal["usd", "s"]
    of: Literal["command", "run"] = "command"

    def used_by(self, sessions: Iterable[SessionSpending]) -> float:
        """Return what other sessions leave less of it, in its unit; nothing where it is of one command."""
        if self.of == "command":
            return 0.0
        spent = (session.spent for session in sessions)
        return math.fsum(one.wall_s if self.unit == "s" else one.total_usd for one in spent)

    def amount(self, value: float) -> str:
        """Render an amount in the budget's unit."""
        return f"${value:.4f}" if self.unit == "usd" else f"{value:.1f} s"


class BudgetGuard:
    """Decides whether a running command may open another shard.

    Open shards are finished. A budget for fewer than ``max_open_shards * items_per_shard`` items is therefore exceeded.
    The guard estimates money from above: it charges every VLM actor that may exist from the command's start, whether
    the actor starts, works, loads or waits. The rows bring the CPU seconds of the readers and the storage requests.

    Args:
        config: holds the prices and the number of actors.
        budget: the limit; None allows everything.
        stats: sums over the rows so far; the caller updates them.
        began_s: when the command began, on this process's `time.perf_counter`; its start counts too.
        others: lists the run's other sessions.
    """

    def __init__(
        self,
        config: JobConfig,
        budget: Budget | None,
        stats: RunStats,
        *,
        began_s: float,
        others: Callable[[], Iterable[SessionSpending]] = tuple,
    ) -> None:
        self._config, self._budget, self._stats, self._list_others = config, budget, stats, others
        self._began_s, self._looked_s, self._noted_s = began_s, -math.inf, began_s
        self._spent_at_first_row: float | None = None
        self._others: dict[str, SessionSpending] = {}
        self._at_work: set[str] = set()

    def allows_more(self, num_in_work: int) -> bool:
        """Say whether the budget has room for more than finishing the ``num_in_work`` items of the open shards.

        The cost of finishing them is estimated from the cost per row so far.
        """
        if self._budget is None:
            return True
        self._look()
        spent, num_rows = self._spent(self._budget), self._stats.num_rows
        left = self._budget.limit - self._budget.used_by(self._others.values())
        if num_rows and self._spent_at_first_row is None:
            self._spent_at_first_row = spent
        if self._spent_at_first_row is None or num_rows < _MIN_ROWS:
            return spent < left
        rate = (spent - self._spent_at_first_row) / (num_rows - 1)
        return spent + rate * num_in_work < left

    def note_in(self, session: Session) -> None:
        """Note in the session's record, now and then, what it has spent, from above: other commands read it there."""
        now_s = time.perf_counter()
        if now_s - self._noted_s >= LOOK_EVERY_S:
            self._noted_s = now_s
            session.note(self.so_far)

    @property
    def so_far(self) -> Spending:
        """What the command has spent up to now, from above."""
        wall_s = time.perf_counter() - self._began_s
        actor_s = wall_s * self._config.runtime.num_vlm_actors.max
        return Spending(wall_s=wall_s, actor_s=actor_s, total_usd=self._usd(actor_s))

    @property
    def said(self) -> str:
        """The budget, whose it is, and what was spent of it; "" without one."""
        budget = self._budget
        if budget is None:
            return ""
        own, others = budget.amount(self._spent(budget)), budget.amount(budget.used_by(self._others.values()))
        if budget.of == "command":
            return f"{budget.amount(budget.limit)} for this command, {own} spent"
        return f"{budget.amount(budget.limit)} for the whole run, {own} spent by this command and {others} by others"

    def _spent(self, budget: Budget) -> float:
        """Return what this command has spent so far, in the budget's unit."""
        wall_s = time.perf_counter() - self._began_s
        return wall_s if budget.unit == "s" else self._usd(wall_s * self._config.runtime.num_vlm_actors.max)

    def _usd(self, actor_s: float) -> float:
        """The actors' wall time pays for the device seconds of the rows, so these are not counted again."""
        return actors_usd(self._config, actor_s - self._stats.gpu_s) + self._stats.cost_usd

    def _look(self) -> None:
        """Read what the run's other sessions have spent; say it where one of them goes on spending."""
        if time.perf_counter() - self._looked_s < LOOK_EVERY_S or self._budget is None:
            return
        self._looked_s = time.perf_counter()
        before, self._others = self._others, {session.name: session for session in self._list_others()}
        for name, session in self._others.items():
            known = before.get(name)
            if known is None or session.ended or session.spent == known.spent or name in self._at_work:
                continue
            self._at_work.add(name)
            spent = session.spent
            counted = "counts both" if self._budget.of == "run" else "counts this command alone; /run counts both"
            logger.warning(
                "another command spends on this run, begun at %s: %.0f s and $%.4f so far; --budget %s",
                session.began_at,
                spent.wall_s,
                spent.total_usd,
                counted,
            )


def said_used_up(budget: Budget | None, run_uri: str) -> str:
    """Say that the run's other sessions have spent all of its budget, where they have; nothing need be started then."""
    if budget is None or budget.used_by(spent := other_sessions(run_uri)) < budget.limit:
        return ""
    return f"{budget.amount(budget.limit)} for the whole run, {budget.amount(budget.used_by(spent))} spent before"


def parse_budget(text: str, config: JobConfig) -> Budget:
    """Read the budget of a command line.

    Raises:
        ConfigError: the text is no amount, or names money where no prices are set.
    """
    found = _LIMIT.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(
            f"--budget {text!r}: give money such as 25USD, or time such as 90m, 3h or 2d, for this command; "
            "25USD/run or 3h/run counts all commands on the run"
        )
    unit = found[2].lower()
    of: Literal["command", "run"] = "run" if (found[3] or "").lower() == "run" else "command"
    if unit != "usd":
        return Budget(float(found[1]) * _SECONDS[unit], "s", of)
    if config.prices == PricesConfig():
        raise ConfigError(
            f"--budget {text}: no prices are set; set prices.gpu_hour_usd or prices.cpu_hour_usd, or give a time"
        )
    return Budget(float(found[1]), "usd", of)

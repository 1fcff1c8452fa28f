"""Shows the progress of a run: how far it is, and what limits it.

Draws a bar on a terminal, on stderr, and logs one line every 30 seconds elsewhere. Where the run's items are
tells what limits the run.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tqdm import tqdm

from pipeline.execution.lease import QueueDepths
from pipeline.execution.reporting.summary import RunStats
from pipeline.records import ResultRow

logger = logging.getLogger(__name__)
Limit = Literal["readers", "model", "store"]

LINE_EVERY_S = 30.0
LOOK_EVERY_S = 0.25


class Progress:
    """Shows items/s, visual tokens, what the run waits for and the time left.

    Args:
        total: items that this command has to do.
        stats: sums over the rows so far; `add` updates them.
        terminal: whether to draw a bar; by default where stderr is a terminal.
    """

    def __init__(self, total: int, stats: RunStats, *, terminal: bool | None = None) -> None:
        self._total, self._stats = total, stats
        terminal = sys.stderr.isatty() if terminal is None else terminal
        self._terminal = terminal
        self._bar: tqdm[Any] | None = None  # drawn with the first row: one that stands still says nothing
        self._bottleneck, self._waits_for = Bottleneck(), ""
        self._began_s = self._said_s = self._looked_s = time.monotonic()

    def add(self, row: ResultRow) -> None:
        """Count one more row."""
        self._stats.add(row)
        self._bottleneck.add(row)
        if self._terminal and self._bar is None:
            self._bar = tqdm(total=self._total, unit="item", file=sys.stderr, dynamic_ncols=True)
        if self._bar is not None:
            self._bar.set_postfix_str(self._notes(), refresh=False)
            self._bar.update(1)

    def tick(self, depths: Callable[[], QueueDepths]) -> None:
        """Sample where the items are, and log the line when it is due; to be called often."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_EVERY_S:
            self._bottleneck.observe(depths(), now_s - self._looked_s)
            self._looked_s = now_s
            if self._bar is not None:
                self._bar.refresh()  # its clock goes on between two rows
        if now_s - self._said_s >= LINE_EVERY_S:
            self._said_s, self._waits_for = now_s, self._bottleneck.verdict()
            if self._bar is None:
                logger.info("%s", self.line(now_s - self._began_s))

    def line(self, elapsed_s: float) -> str:
        """Return the state in one line."""
        done = self._stats.num_rows
        if not done:
            return f"0/{self._total} items after {elapsed_s:.0f} s; {self._waits_for or 'the model is being loaded'}"
        rate = done / elapsed_s if elapsed_s > 0 else 0.0
        left = f"{_clock((self._total - done) / rate)} left" if rate else "time left unknown"
        return f"{done}/{self._total} items, {rate:.2f} items/s, {self._notes()}, {left}"

    def close(self) -> None:
        """Close the bar, so that the terminal is left in order."""
        if self._bar is not None:
            self._bar.close()

    def _notes(self) -> str:
        failed = self._stats.statuses["failed"]
        retention = self._stats.retention
        tokens = retention.brief if retention.ratio is not None else ""
        notes = [tokens, f"{failed} failed" if failed else "", self._waits_for]
        return ", ".join(filter(None, notes))


def limit_at(depths: QueueDepths) -> Limit | None:
    """Return what limits the run at this moment; None where that cannot be told."""
    if depths.capacity is None:
        return None
    if depths.num_loaded or (depths.num_running and depths.num_running >= depths.capacity):
        return "model"
    if depths.num_loading:
        return "readers"  # the workers have free capacity, and no loaded item waits for it
    if depths.num_running:
        return "model"  # no item is left to load, or no shard may be opened before these items end
    return "store" if depths.num_unpublished else None


@dataclass(slots=True)
class Bottleneck:
    """Sums, for each possible limit, the seconds in which it limited the run since the last verdict."""

    _limited_s: dict[Limit, float] = field(default_factory=dict)
    _fetch_s: float = 0.0
    _decode_s: float = 0.0

    def observe(self, depths: QueueDepths, elapsed_s: float) -> None:
        """Add a sample: the queues had these depths for ``elapsed_s`` seconds."""
        if limit := limit_at(depths):
            self._limited_s[limit] = self._limited_s.get(limit, 0.0) + elapsed_s

    def add(self, row: ResultRow) -> None:
        """Add a row's seconds of fetching and of decoding."""
        self._fetch_s += row.fetch_s
        self._decode_s += row.load_s + row.preprocess_s

    def verdict(self) -> str:
        """Name what limited the run since the last call, such as ``waits for the model (91%)``; "" without a sample."""
        if not self._limited_s:
            return ""
        limit = max(self._limited_s, key=self._limited_s.__getitem__)
        what = {"model": "the model", "store": "the store (publishing)", "readers": "the readers"}[limit]
        if limit == "readers" and self._fetch_s > self._decode_s:
            what = "the store (fetching)"
        share = self._limited_s[limit] / sum(self._limited_s.values())
        self._limited_s.clear()
        self._fetch_s = self._decode_s = 0.0
        return f"waits for {what} ({share:.0%})"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

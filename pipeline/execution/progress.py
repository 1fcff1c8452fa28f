"""Progress while a run goes on: how far it is, and what it waits for, told from where its items are.

A bar on a terminal, else one line per 30 seconds, to stderr only. Knows nothing of Ray or shards.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tqdm import tqdm

from pipeline.execution.lease import QueueDepths
from pipeline.execution.summary import RunStats
from pipeline.records import ResultRow

Limit = Literal["readers", "model", "store"]

LINE_EVERY_S = 30.0
LOOK_EVERY_S = 0.25


class Progress:
    """Shows items/s, kept ratio, what the run waits for and the time left.

    Args:
        total: items to do by this command.
        tally: of the rows so far; `add` feeds it.
        terminal: draw a bar; by default where stderr is a terminal.
    """

    def __init__(self, total: int, tally: RunStats, *, terminal: bool | None = None) -> None:
        self._total, self._tally = total, tally
        terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar = tqdm(total=total, unit="item", file=sys.stderr, dynamic_ncols=True) if terminal else None
        self._bottleneck, self._waits_for = Bottleneck(), ""
        self._began_s = self._said_s = self._looked_s = time.monotonic()

    def add(self, row: ResultRow) -> None:
        """One more row."""
        self._tally.add(row)
        self._bottleneck.add(row)
        if self._bar is not None:
            self._bar.set_postfix_str(self._notes(), refresh=False)
            self._bar.update(1)

    def tick(self, flow: Callable[[], QueueDepths]) -> None:
        """Called often; looks where the items are now and then, and speaks when it is time."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_EVERY_S:
            self._bottleneck.observe(flow(), now_s - self._looked_s)
            self._looked_s = now_s
        if now_s - self._said_s >= LINE_EVERY_S:
            self._said_s, self._waits_for = now_s, self._bottleneck.verdict()
            if self._bar is None:
                print(self.line(now_s - self._began_s), file=sys.stderr, flush=True)

    def line(self, elapsed_s: float) -> str:
        """The state in one line."""
        done = self._tally.num_rows
        rate = done / elapsed_s if elapsed_s > 0 else 0.0
        left = f"{_clock((self._total - done) / rate)} left" if rate else "time left unknown"
        return f"{done}/{self._total} items, {rate:.2f} items/s, {self._notes()}, {left}"

    def close(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()

    def _notes(self) -> str:
        failed = self._tally.statuses["failed"]
        notes = [f"kept {self._tally.kept_ratio:.1%}", f"{failed} failed" if failed else "", self._waits_for]
        return ", ".join(filter(None, notes))


def limit_at(flow: QueueDepths) -> Limit | None:
    """What holds everything else up; None where that cannot be told."""
    if flow.capacity is None:
        return None
    if flow.num_loaded or (flow.num_running and flow.num_running >= flow.capacity):
        return "model"
    if flow.num_loading:
        return "readers"  # the workers have room, and nothing is there to fill it
    if flow.num_running:
        return "model"  # nothing is left to be loaded, or to be opened before these end
    return "store" if flow.num_unpublished else None


@dataclass(slots=True)
class Bottleneck:
    """Seconds by what limited them, since the last verdict."""

    _limited_s: dict[Limit, float] = field(default_factory=dict)
    _fetch_s: float = 0.0
    _decode_s: float = 0.0

    def observe(self, flow: QueueDepths, elapsed_s: float) -> None:
        """So it was for so long."""
        if limit := limit_at(flow):
            self._limited_s[limit] = self._limited_s.get(limit, 0.0) + elapsed_s

    def add(self, row: ResultRow) -> None:
        """A row tells what its reader was busy with."""
        self._fetch_s += row.fetch_s
        self._decode_s += row.load_s + row.preprocess_s

    def verdict(self) -> str:
        """Such as ``waits for the model (91%)``, of the time since the last call; "" where nothing was seen."""
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

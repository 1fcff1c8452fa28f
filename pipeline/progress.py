"""Progress while a run goes on: a bar on a terminal, else one line per 30 seconds. Writes to stderr only."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from pipeline.records import ResultRow
from pipeline.summary import Tally

LINE_EVERY_S = 30.0


class Progress:
    """Shows items/s, kept ratio and time left.

    Args:
        total: items to do by this command.
        tally: of the rows so far; `add` feeds it.
        terminal: draw a bar; by default where stderr is a terminal.
    """

    def __init__(self, total: int, tally: Tally, *, terminal: bool | None = None) -> None:
        self._total, self._tally = total, tally
        terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar = tqdm(total=total, unit="item", file=sys.stderr, dynamic_ncols=True) if terminal else None
        self._began_s = self._said_s = time.monotonic()

    def add(self, row: ResultRow) -> None:
        """One more row."""
        self._tally.add(row)
        if self._bar is not None:
            self._bar.set_postfix_str(self._notes(), refresh=False)
            self._bar.update(1)

    def tick(self) -> None:
        """Called often; speaks when it is time."""
        now_s = time.monotonic()
        if self._bar is None and now_s - self._said_s >= LINE_EVERY_S:
            self._said_s = now_s
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
        return f"kept {self._tally.kept_ratio:.1%}" + (f", {failed} failed" if failed else "")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

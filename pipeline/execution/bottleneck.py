"""What a run waits for, told from where its items are: the readers, the model, or the store.

Pure: reads no clock and knows nothing of Ray, shards or how anything is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.records import ResultRow

Limit = Literal["readers", "model", "store"]


@dataclass(frozen=True, slots=True)
class Flow:
    """Where the items of the open shards are at one moment.

    Attributes:
        num_loading: with the readers.
        num_loaded: loaded, and with no worker yet.
        num_running: with the workers.
        num_unpublished: shards that are complete and do not stand in the output yet.
        room: items that fill the batches of the workers that stand; None where loading and working take turns, so
            that neither waits for the other.
    """

    num_loading: int
    num_loaded: int
    num_running: int
    num_unpublished: int
    room: int | None


def limit_at(flow: Flow) -> Limit | None:
    """What holds everything else up; None where that cannot be told."""
    if flow.room is None:
        return None
    if flow.num_loaded or (flow.num_running and flow.num_running >= flow.room):
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

    def see(self, flow: Flow, elapsed_s: float) -> None:
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

"""What each session of a run spent: one small JSON a session in ``sessions/``, summed when the run is finished.

A session is one command that had something to do. Its file is written when it begins and again when it ends, so one
that was killed is seen as a session of unknown cost. It says also on which device the models were, which ``auto``
leaves to each session, and of which release the program was. Knows nothing of rows.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from illava import __version__
from pipeline.cost import Spending, run_cost
from pipeline.errors import ItemError, StorageError
from pipeline.storage import storage

if TYPE_CHECKING:
    from pipeline.runs.run_folder import Run

FOLDER = "sessions"


class Session:
    """The file of one session.

    Args:
        run: opened and placed; the file is written at once.
    """

    def __init__(self, run: Run) -> None:
        self._began = datetime.now(UTC)
        self._attempt = run.attempt
        self._placement = {
            "device": run.config.model.device,
            "gpus_per_actor": run.config.runtime.gpus_per_actor,
            "dtype": run.config.model.dtype,
        }
        name = f"{self._began:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}.json"
        self._uri = storage.join(run.uri, FOLDER, name)
        self._write(None)

    def end(self, spent: Spending) -> None:
        """The session ends here."""
        self._write(spent)

    def _write(self, spent: Spending | None) -> None:
        record = {
            "began_at": self._began.isoformat(timespec="seconds"),
            "attempt": self._attempt,
            "illava_version": __version__,
            **self._placement,
            "spent": None if spent is None else asdict(spent),
        }
        storage.write_atomic(self._uri, json.dumps(record, indent=2).encode())


def run_spending(run_uri: str) -> tuple[Spending, int, int]:
    """All sessions of a run together; how many there were, and how many of them ended without saying what they spent.

    Raises:
        StorageError: a session's file cannot be read.
    """
    total, num_sessions, num_unknown = Spending(), 0, 0
    for uri, record in _records(run_uri):
        num_sessions += 1
        try:
            spent = record["spent"] if record["spent"] is None else Spending(**record["spent"])
        except (KeyError, TypeError) as error:
            raise StorageError(_unreadable(uri, error)) from error
        if spent is None:
            num_unknown += 1
        else:
            total += spent
    return total, num_sessions, num_unknown


def run_placements(run_uri: str) -> list[dict[str, Any]]:
    """Where the run's sessions had their models: each device and GPUs an actor once, with the number of sessions.

    Raises:
        StorageError: a session's file cannot be read.
    """
    counts: Counter[tuple[Any, ...]] = Counter()
    for _, record in _records(run_uri):
        counts[record.get("device"), record.get("gpus_per_actor")] += 1
    return [
        {"device": device, "gpus_per_actor": gpus, "num_sessions": count} for (device, gpus), count in counts.items()
    ]


def cost_record(run_uri: str, items_usd: float) -> dict[str, Any]:
    """The cost of a whole run, as ``_RUN.json`` and the report have it.

    Args:
        run_uri: the folder.
        items_usd: the sum of its rows' ``cost_usd``.
    """
    spent, num_sessions, num_unknown = run_spending(run_uri)
    cost = run_cost(spent, items_usd)
    return {
        **asdict(spent),
        "items_usd": cost.items_usd,
        "lost_usd": cost.lost_usd,
        "num_sessions": num_sessions,
        "num_sessions_unknown": num_unknown,
    }


def _records(run_uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in storage.list_names(storage.join(run_uri, FOLDER)):
        if not name.endswith(".json"):
            continue
        uri = storage.join(run_uri, FOLDER, name)
        try:
            record = json.loads(storage.read(uri))
        except (ItemError, ValueError) as error:
            raise StorageError(_unreadable(uri, error)) from error
        if not isinstance(record, dict):
            raise StorageError(_unreadable(uri, f"it holds a {type(record).__name__}"))
        yield uri, record


def _unreadable(uri: str, reason: object) -> str:
    return f"{uri} cannot be read as a session's record: {reason}"

"""Records what each session of a run spent: one small JSON file per session in ``sessions/``, summed at the end.

A session is one command that had something to do. Its file is written when the session begins, now and then while it
goes on (``so_far``, counted from above), and when it ends: a killed session counts as one of unknown cost, and a budget
of the whole run counts it with what it had spent so far. The file names the driver's process, which tells another job
whether it may still be at work. The file also records the device of the models, which ``auto``
chooses anew in each session, and the release of the program.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from illava import __version__
from pipeline.cost import Spending, run_cost
from pipeline.errors import ItemError, StorageError
from pipeline.storage import storage

if TYPE_CHECKING:
    from pipeline.runs.run_folder import Run

FOLDER = "sessions"


class Session:
    """Writes the file of one session.

    Args:
        run: the opened and placed run; the file is written at once.

    Attributes:
        name: of the file, without its ending.
    """

    def __init__(self, run: Run) -> None:
        self._began = datetime.now(UTC)
        self._attempt = run.attempt
        self._placement = {
            "device": run.config.model.device,
            "gpus_per_actor": run.config.runtime.gpus_per_actor,
            "dtype": run.config.model.dtype,
        }
        self.name = f"{self._began:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        self._uri = storage.join(run.uri, FOLDER, f"{self.name}.json")
        self._write(None, None)

    def note(self, so_far: Spending) -> None:
        """Record what the session has spent so far, for whoever else spends on this run."""
        self._write(None, so_far)

    def end(self, spent: Spending | None, *, num_rows: int | None = None, so_far: Spending | None = None) -> None:
        """Record that the session ends, what it spent, and how many rows it made.

        ``spent`` is None where an error ended the session before that was known; then ``so_far`` bounds it from above.
        """
        self._write(spent, so_far, num_rows, ended_at=datetime.now(UTC))

    def _write(
        self,
        spent: Spending | None,
        so_far: Spending | None,
        num_rows: int | None = None,
        *,
        ended_at: datetime | None = None,
    ) -> None:
        record = {
            "began_at": self._began.isoformat(timespec="milliseconds"),
            "attempt": self._attempt,
            "illava_version": __version__,
            **self._placement,
            "driver": this_driver(),
            "ended_at": None if ended_at is None else ended_at.isoformat(timespec="milliseconds"),
            "spent": None if spent is None else asdict(spent),
            "num_rows": num_rows,
            "so_far": None if so_far is None else asdict(so_far),
        }
        storage.write_atomic(self._uri, json.dumps(record, indent=2).encode())


@dataclass(frozen=True, slots=True)
class SessionSpending:
    """Says what one session of a run has spent.

    Attributes:
        name: of its file, without the ending.
        began_at: ISO 8601 in UTC.
        spent: in all, or so far where it has not ended.
        ended: whether it said that it ended; else it is at work, or was killed.
    """

    name: str
    began_at: str
    spent: Spending
    ended: bool


@dataclass(frozen=True, slots=True)
class SessionSpan:
    """Says when one session of a run was at work, in ISO 8601; ``ended_at`` is None where it did not say."""

    began_at: str
    ended_at: str | None


def session_spans(run_uri: str) -> list[SessionSpan]:
    """List when the run's sessions were at work.

    Raises:
        StorageError: a session's file cannot be read.
    """
    found = [(record.get("began_at"), record.get("ended_at")) for _, record in _records(run_uri)]
    return [SessionSpan(began_at, ended_at) for began_at, ended_at in found if began_at]


def other_sessions(run_uri: str, *, but: str = "") -> list[SessionSpending]:
    """List what all sessions of a run have spent that have begun, ended or not, but for the one of this name.

    Raises:
        StorageError: a session's file cannot be read.
    """
    found = []
    for uri, record in _records(run_uri):
        ended = bool(record.get("spent") or record.get("ended_at"))
        try:
            spent = Spending(**(record["spent"] or record.get("so_far") or {}))
        except (KeyError, TypeError) as error:
            raise StorageError(_unreadable(uri, error)) from error
        name = uri.rpartition("/")[2].removesuffix(".json")
        if name != but:
            found.append(SessionSpending(name, record.get("began_at") or "", spent, ended))
    return found


def run_spending(run_uri: str) -> tuple[Spending, int, int]:
    """Sum all sessions of a run; count them, and those among them that ended without recording what they spent.

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


def unended_sessions(run_uri: str) -> list[tuple[str, dict[str, Any] | None]]:
    """List the sessions that did not say that they ended: name, and the process that drives or drove each.

    Raises:
        StorageError: a session's file cannot be read.
    """
    return [
        (uri.rpartition("/")[2].removesuffix(".json"), record.get("driver"))
        for uri, record in _records(run_uri)
        if record.get("spent") is None and record.get("ended_at") is None
    ]


def run_rate(run_uri: str) -> float | None:
    """Return the rows a second of all sessions that have ended and say how many they made; None where none does."""
    num_rows, wall_s = 0, 0.0
    for _, record in _records(run_uri):
        if record.get("num_rows") and record.get("spent"):
            num_rows += record["num_rows"]
            wall_s += record["spent"].get("wall_s", 0.0)
    return num_rows / wall_s if wall_s else None


def run_placements(run_uri: str) -> list[dict[str, Any]]:
    """List where the run's sessions had their models, the first session first: device, GPUs per actor, how many.

    Raises:
        StorageError: a session's file cannot be read.
    """
    counts: Counter[tuple[Any, ...]] = Counter()
    for record in sorted((record for _, record in _records(run_uri)), key=lambda one: one.get("began_at") or ""):
        counts[record.get("device"), record.get("gpus_per_actor")] += 1
    return [
        {"device": device, "gpus_per_actor": gpus, "num_sessions": count} for (device, gpus), count in counts.items()
    ]


def cost_record(run_uri: str, items_usd: float) -> dict[str, Any]:
    """Return the cost of a whole run, as ``_RUN.json`` and the report have it.

    Args:
        run_uri: the run folder.
        items_usd: sum of the rows' ``cost_usd``.
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


def this_driver() -> dict[str, Any]:
    """Describe this process, so that another one can tell whether it is still there."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid)}


def may_be_alive(driver: Mapping[str, Any] | None) -> bool:
    """Whether a process that `this_driver` described may still be there; of another machine's that is not known.

    A session of an earlier version names no driver: it may be.
    """
    if not driver or driver.get("host") != socket.gethostname() or not isinstance(driver.get("pid"), int):
        return True
    try:
        os.kill(driver["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _started(driver["pid"])
    return now is None or driver.get("started") in (None, now)  # another start: another process has the number by now


def _started(pid: int) -> str | None:
    """When a process of this machine began: the boot's id and clock ticks since then; None where that is not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None

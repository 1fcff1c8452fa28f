"""Lets a running command show that it is at work, and lets others see it.

Each session has one small object that it writes anew every few seconds and removes at its end.

Nothing is decided by a heartbeat: which shard is whose, and what is published, is settled without it. It only tells
people. An observer compares what it reads with what it read before, on its own clock, so that no two clocks need agree.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import PipelineError
from pipeline.faults import spared
from pipeline.runs.sessions import FOLDER
from pipeline.storage import storage

logger = logging.getLogger(__name__)
_ENDING = ".beat"
_EVERY_S, _EVERY_IN_STORE_S = 2.0, 10.0
_LEAST_STALE_S = 30.0
_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class Beat:
    """Holds one sign of life.

    Attributes:
        session: name of the session that writes it.
        host, pid: where that session's driver runs.
        number: counts the session's beats; another number is another sign of life.
        every_s: seconds between two of them.
        progress: what the session says of itself, such as ``num_rows`` and ``wall_s``.
    """

    session: str
    host: str
    pid: int
    number: int
    every_s: float
    progress: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"session {self.session} (process {self.pid} on {self.host})"

    @property
    def stale_s(self) -> float:
        """Seconds without a change after which the session is taken for dead."""
        return max(3 * self.every_s, _LEAST_STALE_S)


class Observer:
    """Tells which sessions of a run are at work, by whether their beats change between two looks.

    Args:
        run_uri: the run folder.
        own: name of the observer's own session, which it does not look at.
        clock: seconds on the observer's own clock.

    Attributes:
        at_work: sessions that were seen to beat, and have done so lately.
        unknown: sessions that have left a beat, of which no second one was seen yet.
        dead: sessions whose beat has not changed for `Beat.stale_s`.
    """

    def __init__(self, run_uri: str, *, own: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._run_uri, self._own, self._clock = run_uri, own, clock
        self._seen: dict[str, tuple[Beat, float, bool]] = {}
        self.at_work: list[Beat] = []
        self.unknown: list[Beat] = []
        self.dead: list[Beat] = []

    def look(self) -> None:
        """Read all beats, and compare them with those of the look before."""
        now_s, before, self._seen = self._clock(), self._seen, {}
        self.at_work, self.unknown, self.dead = [], [], []
        for beat in read_beats(self._run_uri):
            if beat.session == self._own:
                continue
            old, since_s, has_moved = before.get(beat.session, (beat, now_s, False))
            if old.number != beat.number:
                since_s, has_moved = now_s, True
            self._seen[beat.session] = (beat, since_s, has_moved)
            is_stale = now_s - since_s >= beat.stale_s
            (self.dead if is_stale else self.at_work if has_moved else self.unknown).append(beat)


class Heartbeat:
    """Writes a session's beats, once started from a thread of its own, and logs which other sessions are at work.

    Whatever goes wrong with it is logged and hurts nothing else.

    Args:
        run_uri: the run folder.
        session: name of the session.
        progress: returns what the session says of itself; called from the thread.
        every_s: seconds between two beats; by default by what kind of place the folder is.
    """

    def __init__(
        self, run_uri: str, session: str, progress: Callable[[], Mapping[str, Any]], *, every_s: float | None = None
    ) -> None:
        self._uri = storage.join(run_uri, FOLDER, f"{session}{_ENDING}")
        self._session, self._progress, self._number = session, progress, 0
        self._every_s = every_s or (_EVERY_S if storage.is_local(run_uri) else _EVERY_IN_STORE_S)
        self._observer, self._said = Observer(run_uri, own=session), set[str]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Beat from now on, until `close`."""
        self._thread.start()

    def beat(self) -> None:
        """Write one sign of life, and look for those of others."""
        self._number += 1
        record = {
            "session": self._session,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "number": self._number,
            "every_s": self._every_s,
            "progress": dict(self._progress()),
        }
        storage.write_atomic(self._uri, json.dumps(record).encode())
        self._observer.look()
        for beat in self._observer.unknown:
            self._say(beat, logging.INFO, "%s has not ended: it was killed, or it is at work; that is being looked at")
        for beat in self._observer.at_work:
            text = (
                "another job is at work on this output, %s: no row is lost or doubled, but items may be computed twice"
            )
            self._say(beat, logging.WARNING, text)
        for beat in self._observer.dead:
            self._say(beat, logging.INFO, f"%s has shown no sign of life for {beat.stale_s:.0f} s: taken for dead")
            storage.delete(storage.join(self._uri.rpartition("/")[0], f"{beat.session}{_ENDING}"))

    def close(self) -> None:
        """End the beats and remove the object."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)
        self._guarded(lambda: storage.delete(self._uri))

    def _run(self) -> None:
        with spared():
            while True:
                self._guarded(self.beat)
                if self._ended.wait(self._every_s):
                    return

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            with spared():
                action()
        except Exception as error:
            self._say_once("error", logging.INFO, f"no heartbeat could be written or read: {error}")

    def _say(self, beat: Beat, level: int, text: str) -> None:
        self._say_once(f"{beat.session} {text}", level, text % beat)

    def _say_once(self, what: str, level: int, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.log(level, "%s", text)


def read_beats(run_uri: str) -> Iterator[Beat]:
    """Yield the signs of life in a run's folder; one that is being removed or cannot be read is passed over."""
    folder = storage.join(run_uri, FOLDER)
    for name in storage.list_names(folder):
        if not name.endswith(_ENDING):
            continue
        try:
            yield Beat(**json.loads(storage.read(storage.join(folder, name))))
        except (PipelineError, ValueError, TypeError):
            continue


def watch(
    observers: Mapping[str, Observer],
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Look until each session that has left a beat was seen to beat again, or for two and a half of its periods."""
    began_s = clock()
    while True:
        for observer in observers.values():
            observer.look()
        unknown = [beat for observer in observers.values() for beat in observer.unknown]
        if not unknown or clock() - began_s > 2.5 * max(beat.every_s for beat in unknown):
            return
        sleep(0.25)

"""Describes by which keys runs differ, and records what a user accepts by ``--accept KEY``.

Each accepted difference is one small object in ``accepted/``.
An accepted difference holds for the run that records it: the run goes on with it, and so do later runs that take this
one's rows for done. ``run.json`` is never changed by it, and two drivers that accept the same write the same object.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import ConfigError, ItemError, StorageError
from pipeline.runs.config_fingerprint import digest_of, in_config
from pipeline.storage import storage

FOLDER = "accepted"


@dataclass(frozen=True, slots=True)
class Difference:
    """Describes one key of the config fingerprint with the value of an earlier run, or command, and today's.

    Attributes:
        key: of the fingerprint, such as ``versions.torch``.
        there: the earlier value; None where there was none.
        here: the value now.
    """

    key: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.key} {json.dumps(self.there)} -> {json.dumps(self.here)}"

    @property
    def identity(self) -> str:
        """A text that two differences share only where they are the same one."""
        return digest_of([self.key, self.there, self.here])


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Describes an earlier run whose rows do not count.

    Attributes:
        uri: the run folder.
        differences: by which it was made in another way.
        num_rows: its answered rows of the kinds of media that this concerns; None where they were not counted.
    """

    uri: str
    differences: tuple[Difference, ...]
    num_rows: int | None


@dataclass(frozen=True, slots=True)
class DoneItems:
    """Holds the items that need not be processed again.

    Attributes:
        item_ids: items with an answer under the given config fingerprint; an id may come from several runs.
        num_runs: number of earlier runs that were looked at.
        passed_over: those whose rows, or some of them, do not count.
        accepted: differences that count nevertheless, by ``--accept`` now or when a run before took them.
        failed: items that would only fail again -> what the medium's ETag was then; None where it was not known.
    """

    item_ids: list[str] = field(default_factory=list)
    num_runs: int = 0
    passed_over: tuple[PassedOver, ...] = ()
    accepted: tuple[Difference, ...] = ()
    failed: Mapping[str, str | None] = field(default_factory=dict)


def differences(diff: Mapping[str, tuple[Any, Any]]) -> list[Difference]:
    """Return what `pipeline.runs.run_record.config_diff` found, as records."""
    return [Difference(key, there, here) for key, (there, here) in diff.items()]


def read_accepted(run_uri: str) -> list[Difference]:
    """Read the differences that were accepted for a run; empty where there is no run.

    Raises:
        StorageError: a record cannot be read.
    """
    folder, found = storage.join(run_uri, FOLDER), []
    for name in storage.list_names(folder):
        if not name.endswith(".json"):
            continue
        uri = storage.join(folder, name)
        try:
            record = json.loads(storage.read(uri))
            found.append(Difference(record["key"], record["there"], record["here"]))
        except (ItemError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{uri} cannot be read as an accepted difference: {error}") from error
    return found


def record_accepted(run_uri: str, accepted: Iterable[Difference]) -> None:
    """Write the accepted differences into the run's folder; what stands there already is written as it is."""
    for one in accepted:
        data = json.dumps(asdict(one), indent=2, sort_keys=True).encode()
        storage.write_atomic(storage.join(run_uri, FOLDER, f"{one.identity}.json"), data)


def check_keys(accept: Collection[str], known: Collection[str]) -> None:
    """Refuse a key of ``--accept`` that no fingerprint has; a change of behaviour may be of another release.

    Raises:
        ConfigError: names the nearest keys.
    """
    for key in accept:
        if key not in known and not key.startswith("behaviour."):
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"versions are {', '.join(_versions(known))}"
            raise ConfigError(f"--accept {key}: no config fingerprint has this key; {meant}")


def refuse_config_keys(accept: Collection[str], diff: Mapping[str, Any], run_uri: str) -> None:
    """Refuse to go on with a run under another configuration: its rows and its record would no longer say the same.

    Raises:
        ConfigError: a key of ``--accept`` that differs is a key of the configuration.
    """
    if keys := sorted(key for key in diff if key in accept and in_config(key)):
        raise ConfigError(
            f"--accept {keys[0]}: it is a key of the configuration, and the rows of {run_uri} have one configuration. "
            "Set it back as it was, or choose a new output.uri; there, with input.exclude_runs, --accept takes the "
            "rows of this run for done"
        )


def _versions(known: Collection[str]) -> list[str]:
    return sorted(key for key in known if key.startswith("versions."))

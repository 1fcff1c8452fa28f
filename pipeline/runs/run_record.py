"""``run.json`` read in today's words, whatever version wrote it.

A run is the same one where its record *means* the same, key by key, not where digests are equal: the digests in a
record are the run's name for good. So a key that was added later has its default in an earlier record, a key that was
renamed is found under `RENAMED_KEYS`, and what no longer counts is left out. Reads; writes nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from illava.plan import ReductionPlan, dump_digest
from pipeline.config.load import parse_config
from pipeline.config.schema import JobConfig, result_fields
from pipeline.errors import ConfigError, ItemError, RefusedError
from pipeline.runs.config_fingerprint import digest_of, in_config, is_fact
from pipeline.storage import storage

RUN_FILE = "run.json"
# Dotted key as an earlier version wrote it -> today's; of a value or of a whole section.
RENAMED_KEYS: dict[str, str] = {"input.skip_done_in": "input.exclude_runs"}
# What earlier recipes held and what changes no row by itself. Of a device its dtype does, which has its own key; of a
# release its changes of behaviour do, which have their own names (`pipeline.runs.config_fingerprint.BEHAVIOUR`).
_CHANGES_NO_ROW = frozenset({"schema_version", "model.device", "attention_backend", "kernels", "versions.illava"})
_RUN_KEYS = {
    "fingerprint": str,
    "recipe_digest": str,
    "recipe": dict,
    "manifest_digest": str,
    "num_items": int,
    "num_shards": int,
    "items_per_shard": int,
    "attempt": int,
    "nonce": str,
}


def read_run_file(run_uri: str) -> dict[str, Any]:
    """The content of ``run.json``.

    Raises:
        RefusedError: there is none, or it is not one of ours.
    """
    uri = storage.join(run_uri, RUN_FILE)
    try:
        found = json.loads(storage.read(uri))
    except ItemError as error:
        if error.error_type != "not_found":
            raise
        raise RefusedError(f"{uri} does not exist: this folder holds no run") from error
    except ValueError as error:
        raise RefusedError(f"{uri} is not JSON ({error}): it was damaged, or is not of this program") from error
    bad = [k for k, kind in _RUN_KEYS.items() if not isinstance(found, dict) or not isinstance(found.get(k), kind)]
    if bad:
        raise RefusedError(f"{uri} is not a run file of this program: {', '.join(bad)} missing or of another type")
    return found


def fingerprint_of(recipe_digest: str, manifest_digest: str, items_per_shard: int) -> str:
    """A run's name in every row and part."""
    return digest_of([recipe_digest, manifest_digest, items_per_shard])


def wrong_digests(record: Mapping[str, Any]) -> list[str]:
    """Where a record does not agree with itself: it was edited after the run was opened."""
    recipe_digest = digest_of(record["recipe"])
    fingerprint = fingerprint_of(record["recipe_digest"], record["manifest_digest"], record["items_per_shard"])
    expected = {"recipe_digest": recipe_digest, "fingerprint": fingerprint}
    return [f"{name} is {record[name]}, not {value}" for name, value in expected.items() if record[name] != value]


def recorded_config(record: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> JobConfig:
    """The configuration a run was opened with, later keys at their defaults.

    Raises:
        ConfigError: it has a key that this version does not know, or an override is none.
    """
    return parse_config(_todays(record.get("config") or {}), overrides, source=source)


def recorded_config_fingerprint(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's rows depend on: as `pipeline.runs.config_fingerprint.resolve_config_fingerprint` would say it today.

    Where this version cannot read the keys any more they are given as they stand, so that a refusal names them.
    """
    fields = {_todays_key(key): value for key, value in record["recipe"].items() if key not in _CHANGES_NO_ROW}
    data = _todays(record.get("config") or {})
    for key, value in fields.items():
        if in_config(key):
            _put(data, key, value)
    try:
        config = parse_config(data, source=RUN_FILE)
    except ConfigError:
        return fields
    return result_fields(config) | {key: value for key, value in fields.items() if not in_config(key)}


def config_diff(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> both values, of two recipes in today's words, where rows may differ. A fact counts where both state it."""
    return {
        key: (there.get(key), here.get(key))
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not (is_fact(key) and (key not in there or key not in here))
    }


def recorded_plan_digest(record: Mapping[str, Any]) -> str:
    """What the run's rows have in ``plan_digest``, whatever fields a plan has by now."""
    return record.get("plan_digest") or dump_digest(record["recipe"].get("reduction") or ReductionPlan().model_dump())


def wanted_attempts(record: Mapping[str, Any]) -> dict[int, int]:
    """Shard -> the attempt that a retry makes its part anew in."""
    retried = sorted((int(attempt), shards) for attempt, shards in (record.get("retried_shards") or {}).items())
    return {index: attempt for attempt, shards in retried for index in shards}


def _todays(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a configuration, its keys renamed."""
    renamed = copy.deepcopy(dict(data))
    for old, new in RENAMED_KEYS.items():
        *parents, last = old.split(".")
        place: Any = renamed
        for name in parents:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict) and last in place:
            _put(renamed, new, place.pop(last))
    return renamed


def _todays_key(key: str) -> str:
    for old, new in RENAMED_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return key


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        if not isinstance(data.get(name), dict):
            data[name] = {}
        data = data[name]
    data[last] = value

"""Reads ``run.json`` of any version in the current keys.

Two records name the same run where they *mean* the same, key by key, not where their digests are equal: the digests in
a record are the run's name for good. A key that was added later therefore has its default in an earlier record, a
renamed key is found under `RENAMED_KEYS`, and a key that no longer counts is left out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from illava.plan import ReductionPlan, dump_digest
from pipeline.config.load import parse_config
from pipeline.config.schema import JobConfig, result_fields
from pipeline.errors import ConfigError, ItemError, RefusedError
from pipeline.runs.config_fingerprint import concerning, digest_of, in_config, is_fact
from pipeline.storage import storage

RUN_FILE = "run.json"
# Dotted key of an earlier version -> current key; of a value or of a whole section.
RENAMED_KEYS: dict[str, str] = {"input.skip_done_in": "input.exclude_runs"}
# Keys of earlier fingerprints that change no row by themselves. A device acts through its dtype, which has its own key;
# a release acts through its changes of behaviour, which have names (`pipeline.runs.config_fingerprint.BEHAVIOUR`).
_IGNORED_KEYS = frozenset({"schema_version", "model.device", "attention_backend", "kernels", "versions.illava"})
# Keys whose default is not what was done before they came -> the value that says it. A record that lacks such a key was
# made with that value; a job that goes on with its run says so too.
VALUES_BEFORE: dict[str, Any] = {"sampling.loop_tokens": None}
# The same, of keys of one kind of task.
_VALUES_BEFORE_OF: dict[str, dict[str, Any]] = {
    "document": {"task.enforce_schema": False, "media.over_max_pages": "fail"}
}
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
    """Read ``run.json``.

    Raises:
        RefusedError: there is no such file, or this program did not write it.
    """
    uri = storage.join(run_uri, RUN_FILE)
    try:
        found = json.loads(storage.read(uri))
    except ItemError as error:
        if error.error_type != "not_found":
            raise
        raise RefusedError(f"{uri} does not exist: this folder holds no run; name the output.uri of a job") from error
    except ValueError as error:
        raise RefusedError(
            f"{uri} is not JSON ({error}): it was damaged, or is not of this program. Put the file back, or choose a "
            "new output.uri"
        ) from error
    bad = [k for k, kind in _RUN_KEYS.items() if not isinstance(found, dict) or not isinstance(found.get(k), kind)]
    if bad:
        raise RefusedError(f"{uri} is not a run file of this program: {', '.join(bad)} missing or of another type")
    return found


def fingerprint_of(recipe_digest: str, manifest_digest: str, items_per_shard: int) -> str:
    """Return the digest that names a run in every row and part."""
    return digest_of([recipe_digest, manifest_digest, items_per_shard])


def wrong_digests(record: Mapping[str, Any]) -> list[str]:
    """List the digests that do not fit the record's content: the record was edited after the run was created."""
    recipe_digest = digest_of(record["recipe"])
    fingerprint = fingerprint_of(record["recipe_digest"], record["manifest_digest"], record["items_per_shard"])
    expected = {"recipe_digest": recipe_digest, "fingerprint": fingerprint}
    return [f"{name} is {record[name]}, not {value}" for name, value in expected.items() if record[name] != value]


def recorded_config(record: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> JobConfig:
    """Return the configuration that a run was created with; keys that came later have their defaults.

    Raises:
        ConfigError: the record has a key that this version does not know, or an override is invalid.
    """
    return parse_config(_renamed(record.get("config") or {}), overrides, source=source)


def recorded_config_fingerprint(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a run's config fingerprint, in the current keys.

    They are as `pipeline.runs.config_fingerprint.resolve_config_fingerprint` gives them. Where this version cannot read
    the recorded keys, they are returned unchanged, so that an error message names them.
    """
    fields = {_renamed_key(key): value for key, value in record["recipe"].items() if key not in _IGNORED_KEYS}
    data = _renamed(record.get("config") or {})
    for key, value in fields.items():
        if in_config(key):
            _put(data, key, value)
    try:
        config = parse_config(data, source=RUN_FILE)
    except ConfigError:
        return fields
    return result_fields(config) | {key: value for key, value in fields.items() if not in_config(key)}


def config_diff(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare two fingerprints in the current keys: key -> both values, of each key by which rows may differ.

    A fact about the machine counts only where both fingerprints state it.
    """
    return {
        key: (there.get(key), here.get(key))
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and not (is_fact(key) and (key not in there or key not in here))
    }


def diff_of_kinds(
    there: Mapping[str, Any], here: Mapping[str, Any], kinds: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Compare two fingerprints as `config_diff` does, by what can change a row about media of these kinds.

    Args:
        there: of the earlier run.
        here: of the present job, with all packages.
        kinds: of media.
    """
    return config_diff(there, concerning(here, kinds, there=there))


def recorded_plan_digest(record: Mapping[str, Any]) -> str:
    """Return the ``plan_digest`` of the run's rows, whatever fields a plan has by now."""
    return record.get("plan_digest") or dump_digest(record["recipe"].get("reduction") or ReductionPlan().model_dump())


def wanted_attempts(record: Mapping[str, Any]) -> dict[int, int]:
    """Return, for each retried shard, the attempt in which its part is computed again."""
    retried = sorted((int(attempt), shards) for attempt, shards in (record.get("retried_shards") or {}).items())
    return {index: attempt for attempt, shards in retried for index in shards}


def _renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recorded configuration with the current keys."""
    renamed = copy.deepcopy(dict(data))
    for old, new in RENAMED_KEYS.items():
        *parents, last = old.split(".")
        place: Any = renamed
        for name in parents:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict) and last in place:
            _put(renamed, new, place.pop(last))
    kind = (renamed.get("task") or {}).get("kind", "")
    for key, value in (VALUES_BEFORE | _VALUES_BEFORE_OF.get(kind, {})).items():
        section, _, name = key.rpartition(".")
        if name not in (renamed.get(section) or {}):
            _put(renamed, key, value)
    return renamed


def _renamed_key(key: str) -> str:
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

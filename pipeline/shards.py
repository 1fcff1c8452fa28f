"""A run: its folder, its fingerprint, its shards, and what is pending. Resume is listing the parts.

`run.json` is created only if absent and never changed by a running job; parts are published by `pipeline.sink`. Knows
nothing of actors, models or media.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from illava.model_files import require_plain_weights
from pipeline import storage
from pipeline.config import JobConfig
from pipeline.done_items import done_ids
from pipeline.errors import RefusedError, StorageError
from pipeline.inputs import build_manifest
from pipeline.manifest import manifest_bytes
from pipeline.recipe import digest_of, resolve_recipe
from pipeline.records import SCHEMA_VERSION
from pipeline.refusal import refusal
from pipeline.run_folder import (
    FINISHED_FILE,
    RUN_FILE,
    Run,
    manifest_uri,
    read_frozen_manifest,
    read_run_file,
    wanted_attempts,
)
from pipeline.sessions import cost_record, run_placements
from pipeline.sink import list_parts, part_attempts
from pipeline.totals import run_totals


def open_run(config: JobConfig) -> Run:
    """Freeze the manifest and claim the folder, or resume the run that is there.

    Raises:
        RefusedError: the folder holds another run (names the keys that differ, with both values), or parts of none.
        InputError, ConfigError, StorageError: as `build_manifest` and `resolve_recipe`.
        ModelLoadError: a new run asks for a quantised model, an adapter or one that cannot be found.
    """
    return open_planned(plan_run(config))


def open_planned(run: Run) -> Run:
    """What `plan_run` returned, opened: its folder is claimed, or swept where the run stands already."""
    if run.resumed:
        storage.sweep_temporaries(run.uri)
        return run
    model = run.config.model
    require_plain_weights(model.model_id, revision=model.revision)  # whose run.json would refuse the next
    return claim(run)


def claim(run: Run) -> Run:
    """Freeze the manifest and create ``run.json`` in a folder without one, or adopt what another driver created."""
    storage.write_atomic(manifest_uri(run.uri, run.manifest.digest), manifest_bytes(run.manifest))
    record = json.dumps(_run_record(run), indent=2, sort_keys=True).encode()
    if storage.create_exclusive(storage.join(run.uri, RUN_FILE), record):
        return run
    return adopt(run, read_run_file(run.uri))


def plan_run(config: JobConfig) -> Run:
    """What `open_run` would return, without writing anything. Raises as it does."""
    uri = storage.check_uri(config.output.uri).rstrip("/")
    recipe = resolve_recipe(config)
    manifest = build_manifest(config, done_ids=done_ids(config, recipe.digest))
    items_per_shard = config.output.items_per_shard
    fingerprint = digest_of([recipe.digest, manifest.digest, items_per_shard])
    run = Run(uri, config, recipe, fingerprint, manifest, items_per_shard, nonce=secrets.token_hex(8))
    parts = list_parts(uri)
    if storage.exists(storage.join(uri, RUN_FILE)):
        return adopt(run, read_run_file(uri))
    if parts:  # listed before the look for run.json, so that a driver starting beside this one is no false alarm
        raise RefusedError(
            f"{uri} has {len(parts)} parts in data/ and no {RUN_FILE}: whose rows they are cannot be known. Choose a "
            "new output.uri, or move the old parts away"
        )
    return run


def pending_shards(run: Run) -> list[int]:
    """Shards without a part, or with one older than a retry wants, ascending."""
    done = set(done_shards(run.uri, run.least_attempts))
    return [index for index in range(run.num_shards) if index not in done]


def done_shards(run_uri: str, least_attempts: Mapping[int, int]) -> list[int]:
    """Shards whose part stands and is not older than a retry wants, ascending."""
    done = list_parts(run_uri)
    retried = [index for index in done if index in least_attempts]
    found = zip(retried, part_attempts(run_uri, retried), strict=True)
    stale = {index for index, attempt in found if attempt < least_attempts[index]}
    return [index for index in done if index not in stale]


def reopen(run: Run) -> None:
    """Take ``_RUN.json`` away, should it stand: parts are missing again, so its totals will not be theirs."""
    storage.delete(storage.join(run.uri, FINISHED_FILE))


def finish(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Write ``_RUN.json``: totals of all parts, cost and devices of all sessions, digests, versions, the summary.

    Raises:
        StorageError: a shard has no part yet.
    """
    if pending := pending_shards(run):
        raise StorageError(
            f"{run.uri}: {len(pending)} shards have no part yet, the first is {pending[0]}; not finished"
        )
    run.check_still_ours()
    storage.sweep_temporaries(run.uri)
    versions = {key: value for key, value in run.recipe.fields.items() if key.startswith("versions.")}
    totals = run_totals(run.uri, range(run.num_shards))
    record = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": run.fingerprint,
        "recipe_digest": run.recipe.digest,
        "manifest_digest": run.manifest.digest,
        "attempt": run.attempt,
        "num_items": len(run.manifest),
        "num_shards": run.num_shards,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "totals": totals.as_dict(),
        "cost": cost_record(run.uri, totals.sums["cost_usd"]),
        "placements": run_placements(run.uri),
        "summary": summary,
    }
    storage.write_atomic(storage.join(run.uri, FINISHED_FILE), json.dumps(record, indent=2, sort_keys=True).encode())
    return record


def adopt(run: Run, found: dict[str, Any]) -> Run:
    """The run that stands in the folder, if it is the same one.

    Raises:
        RefusedError: it is another one; names the keys that differ, with both values.
    """
    if found["fingerprint"] != run.fingerprint:
        raise RefusedError(refusal(run, found))
    return replace(
        run,
        manifest=read_frozen_manifest(run.uri, found["manifest_digest"]),
        attempt=found["attempt"],
        nonce=found["nonce"],
        least_attempts=wanted_attempts(found),
        retry_only=tuple(found.get("retry_only") or ()),
        resumed=True,
    )


def _run_record(run: Run) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": run.fingerprint,
        "recipe_digest": run.recipe.digest,
        "recipe": run.recipe.fields,
        "manifest_digest": run.manifest.digest,
        "num_items": len(run.manifest),
        "num_shards": run.num_shards,
        "items_per_shard": run.items_per_shard,
        "attempt": run.attempt,
        "nonce": run.nonce,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": run.config.model_dump(mode="json"),
    }

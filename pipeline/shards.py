"""A run: its folder, its fingerprint, its shards, and what is pending. Resume is listing the parts.

`run.json` is created only if absent and never changed by a running job; parts are published by `pipeline.sink`. Knows
nothing of actors, models or media.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pipeline import storage
from pipeline.config import JobConfig
from pipeline.errors import RefusedError, StorageError
from pipeline.inputs import Manifest, build_manifest, manifest_bytes, read_manifest
from pipeline.recipe import Recipe, digest_of, resolve_recipe
from pipeline.records import SCHEMA_VERSION, Shard
from pipeline.refusal import refusal
from pipeline.run_record import (
    RUN_FILE,
    read_run_file,
    recipe_difference,
    recorded_plan_digest,
    recorded_recipe,
    wrong_digests,
)
from pipeline.sessions import cost_record
from pipeline.sink import list_parts, part_attempts
from pipeline.totals import run_totals

FINISHED_FILE = "_RUN.json"


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder, opened.

    Attributes:
        uri: the folder.
        config: this session's; may differ from the frozen one in what only affects execution.
        recipe: what rows depend on; a resumed run keeps the one it was opened with.
        fingerprint: digest of recipe, manifest and shard size when it was opened; its name in every row and part.
        plan_digest: of its reduction, as every row has it.
        manifest: frozen when the run was first opened.
        items_per_shard: fixed for the run.
        attempt: 1, raised by each ``retry``.
        nonce: names the writer of ``run.json``.
        least_attempts: shard -> attempt that a retry makes its part anew in; an older part is pending.
        retry_only: error types that the present attempt computes again; all where empty.
        resumed: the run was there before.
    """

    uri: str
    config: JobConfig
    recipe: Recipe
    fingerprint: str
    plan_digest: str
    manifest: Manifest
    items_per_shard: int
    attempt: int = 1
    nonce: str = ""
    least_attempts: Mapping[int, int] = field(default_factory=dict)
    retry_only: tuple[str, ...] = ()
    resumed: bool = False

    @property
    def num_shards(self) -> int:
        return -(-len(self.manifest) // self.items_per_shard)

    def shard(self, index: int) -> Shard:
        """Items of one shard, in manifest order."""
        if not 0 <= index < self.num_shards:
            raise IndexError(f"shard {index} of {self.num_shards}")
        return Shard(index, self.manifest.slice(index * self.items_per_shard, self.items_per_shard))

    def part_metadata(self, shard_index: int) -> dict[str, str]:
        """What every part says of where it belongs."""
        return {
            "illava.run_fingerprint": self.fingerprint,
            "illava.recipe_digest": self.recipe.digest,
            "illava.manifest_digest": self.manifest.digest,
            "illava.attempt": str(self.attempt),
            "illava.shard_index": str(shard_index),
        }

    def check_still_ours(self) -> None:
        """Read ``run.json`` again before a publish.

        Raises:
            RefusedError: the folder belongs to another run or a later attempt by now.
        """
        found = read_run_file(self.uri)
        now = (found["fingerprint"], found["attempt"], found["nonce"])
        if now != (self.fingerprint, self.attempt, self.nonce):
            raise RefusedError(
                f"{self.uri}: run.json changed while this job ran (fingerprint {now[0]}, attempt {now[1]}); another "
                "job took the folder over. Nothing more is published from here"
            )


def open_run(config: JobConfig) -> Run:
    """Freeze the manifest and claim the folder, or resume the run that is there.

    Raises:
        RefusedError: the folder holds another run (names the keys that differ, with both values), or parts of none.
        InputError, ConfigError, StorageError: as `build_manifest` and `resolve_recipe`.
    """
    run = plan_run(config)
    if run.resumed:
        storage.sweep_temporaries(run.uri)
        return run
    return claim(run)


def claim(run: Run) -> Run:
    """Freeze the manifest and create ``run.json`` in a folder without one, or adopt what another driver created."""
    storage.write_atomic(_manifest_uri(run.uri, run.manifest.digest), manifest_bytes(run.manifest))
    record = json.dumps(_run_record(run), indent=2, sort_keys=True).encode()
    if storage.create_exclusive(storage.join(run.uri, RUN_FILE), record):
        return run
    return adopt(run, read_run_file(run.uri))


def plan_run(config: JobConfig) -> Run:
    """What `open_run` would return, without writing anything. Raises as it does."""
    uri = storage.check_uri(config.output.uri).rstrip("/")
    recipe = resolve_recipe(config)
    manifest = build_manifest(config, recipe=recipe)
    items_per_shard = config.output.items_per_shard
    fingerprint = digest_of([recipe.digest, manifest.digest, items_per_shard])
    plan_digest, nonce = config.reduction.digest(), secrets.token_hex(8)
    run = Run(uri, config, recipe, fingerprint, plan_digest, manifest, items_per_shard, nonce=nonce)
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


def wanted_attempts(record: dict[str, Any]) -> dict[int, int]:
    """From ``run.json``: shard -> the attempt that a retry makes its part anew in."""
    retried = sorted((int(attempt), shards) for attempt, shards in (record.get("retried_shards") or {}).items())
    return {index: attempt for attempt, shards in retried for index in shards}


def reopen(run: Run) -> None:
    """Take ``_RUN.json`` away, should it stand: parts are missing again, so its totals will not be theirs."""
    storage.delete(storage.join(run.uri, FINISHED_FILE))


def is_finished(run_uri: str) -> bool:
    """Whether the run has its ``_RUN.json``."""
    return storage.exists(storage.join(run_uri, FINISHED_FILE))


def read_frozen_manifest(run_uri: str, digest: str) -> Manifest:
    """The manifest that was frozen when the run was opened.

    Raises:
        RefusedError: its content does not have the digest in its name.
    """
    uri = _manifest_uri(run_uri, digest)
    manifest = read_manifest(storage.read(uri))
    if manifest.digest != digest:
        raise RefusedError(f"{uri}: the content has digest {manifest.digest}; it was changed after it was frozen")
    return manifest


def finish(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Write ``_RUN.json``: totals over all parts, cost over all sessions, digests, versions, the caller's summary.

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
        "summary": summary,
    }
    storage.write_atomic(storage.join(run.uri, FINISHED_FILE), json.dumps(record, indent=2, sort_keys=True).encode())
    return record


def adopt(run: Run, found: dict[str, Any]) -> Run:
    """The run that stands in the folder, if it is the same one, with the names that it gave itself.

    Raises:
        RefusedError: it is another one; names the keys that differ, with both values. Or its record was edited.
    """
    if wrong := wrong_digests(found):
        raise RefusedError(
            f"{storage.join(run.uri, RUN_FILE)} was edited: {'; '.join(wrong)}. Put the file back as it was, or choose "
            "a new output.uri"
        )
    differs = recipe_difference(recorded_recipe(found), run.recipe.fields)
    same_input = _has_same_input(run, found)
    if differs or not same_input or found["items_per_shard"] != run.items_per_shard:
        raise RefusedError(refusal(run, found, differs, same_input=same_input))
    return replace(
        run,
        recipe=Recipe(found["recipe_digest"], found["recipe"]),
        fingerprint=found["fingerprint"],
        plan_digest=recorded_plan_digest(found),
        manifest=read_frozen_manifest(run.uri, found["manifest_digest"]),
        attempt=found["attempt"],
        nonce=found["nonce"],
        least_attempts=wanted_attempts(found),
        retry_only=tuple(found.get("retry_only") or ()),
        resumed=True,
    )


def _has_same_input(run: Run, found: dict[str, Any]) -> bool:
    """Whether the folder's manifest holds this job's items; one of an earlier version may lack columns."""
    if found["manifest_digest"] == run.manifest.digest:
        return True
    if found["num_items"] != len(run.manifest):
        return False
    return read_frozen_manifest(run.uri, found["manifest_digest"]).holds(run.manifest)


def _run_record(run: Run) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": run.fingerprint,
        "recipe_digest": run.recipe.digest,
        "recipe": run.recipe.fields,
        "plan_digest": run.plan_digest,
        "manifest_digest": run.manifest.digest,
        "num_items": len(run.manifest),
        "num_shards": run.num_shards,
        "items_per_shard": run.items_per_shard,
        "attempt": run.attempt,
        "nonce": run.nonce,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": run.config.model_dump(mode="json"),
    }


def _manifest_uri(run_uri: str, digest: str) -> str:
    return storage.join(run_uri, f"manifest-{digest}.parquet")

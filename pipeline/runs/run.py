"""Opens, resumes and finishes a run, and lists its pending shards. Resuming means listing the published parts.

`run.json` is created only if absent, and a running job never changes it; `pipeline.runs.parquet_sink` publishes parts.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from illava import __version__
from illava.families import require_supported
from pipeline.config.model_check import check_model_options
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError, RefusedError, StorageError
from pipeline.inputs.build_manifest import build_manifest
from pipeline.inputs.columns import LATER_IMAGE_EXTENSIONS, LATER_VIDEO_EXTENSIONS
from pipeline.inputs.manifest import manifest_bytes
from pipeline.records import SCHEMA_VERSION
from pipeline.runs.accepted import (
    Difference,
    check_keys,
    differences,
    read_accepted,
    record_accepted,
    refuse_config_keys,
)
from pipeline.runs.config_fingerprint import ConfigFingerprint, digest_of, in_config, resolve_config_fingerprint
from pipeline.runs.earlier_runs import earlier_items
from pipeline.runs.parquet_sink import list_parts, part_attempts
from pipeline.runs.run_folder import FINISHED_FILE, Run, manifest_uri, read_frozen_manifest
from pipeline.runs.run_record import (
    RUN_FILE,
    diff_of_kinds,
    fingerprint_of,
    read_run_file,
    recorded_config_fingerprint,
    recorded_plan_digest,
    wanted_attempts,
    wrong_digests,
)
from pipeline.runs.sessions import cost_record, run_placements, this_driver
from pipeline.runs.takeover import OtherRunError, clear_replaced, resume_or_replace
from pipeline.runs.totals import run_totals
from pipeline.storage import storage


def open_run(config: JobConfig) -> Run:
    """Freeze the manifest and create ``run.json``, or resume the run that the folder holds.

    Raises:
        RefusedError: the folder holds another run (the message names the keys that differ, with both values), or parts
            without a run.
        InputError, ConfigError, StorageError: as `build_manifest` and `resolve_config_fingerprint`.
        ModelLoadError: a new run asks for a quantised model, an adapter, or a model that cannot be found.
    """
    return open_planned(plan_run(config))


def open_planned(run: Run) -> Run:
    """Open the run that `plan_run` returned: create it, or remove the temporary files of a run that exists."""
    if run.resumed:
        storage.sweep_temporaries(run.uri)
        record_accepted(run.uri, run.accepted)
        return run
    model = run.config.model
    require_supported(
        model.model_id, revision=model.hub_revision
    )  # before run.json, which would refuse the corrected job
    return create_or_resume(run)


def create_or_resume(run: Run) -> Run:
    """Freeze the manifest and create ``run.json``, or resume the run that another driver has created meanwhile."""
    if run.replaces:
        clear_replaced(run)
    storage.write_atomic(manifest_uri(run.uri, run.manifest.digest), manifest_bytes(run.manifest))
    record = json.dumps(_run_record(run), indent=2, sort_keys=True).encode()
    created = storage.create_exclusive(storage.join(run.uri, RUN_FILE), record)
    record_accepted(run.uri, run.accepted)
    return run if created else resume_run(run, read_run_file(run.uri))


def plan_run(config: JobConfig, *, accept: Collection[str] = ()) -> Run:
    """Return what `open_run` would return, without writing anything.

    Args:
        config: the job.
        accept: keys of the config fingerprint in which the folder's run, or an earlier one, may differ: of the former
            only such as no configuration has, like ``versions.torch``.

    Raises:
        ConfigError: ``accept`` names a key that there is not, or one by which the folder's run has another
            configuration.
        RefusedError, ...: as `open_run`.
    """
    uri = storage.folder_uri(config.output.uri)
    if storage.is_local(uri) and os.path.isfile(storage.local_path(uri)):
        raise ConfigError(f"output.uri: {uri} is a file; name a folder, which is made where there is none")
    if config.model.false_revisions and not storage.exists(storage.join(uri, RUN_FILE)):
        key, commit, folder = config.model.false_revisions[0]
        raise ConfigError(
            f"{key}: {commit} is a commit of the hub, but {folder} is a folder here, whose files a run knows by their "
            "hashes; every row would name a commit that nobody compared. Take the line out, or add --set "
            f"{key}=null"
        )
    everything = resolve_config_fingerprint(config)
    check_model_options(config)
    check_keys(accept, everything.fields)
    earlier = earlier_items(config, everything.fields, accept=accept)
    manifest = build_manifest(config, done_ids=earlier.item_ids, failed=earlier.failed)
    config_fingerprint = everything.of_kinds(manifest.kinds)
    items_per_shard = config.output.items_per_shard
    fingerprint = fingerprint_of(config_fingerprint.digest, manifest.digest, items_per_shard)
    plan_digest, nonce = config.reduction.digest(), secrets.token_hex(8)
    run = Run(uri, config, config_fingerprint, fingerprint, plan_digest, manifest, items_per_shard, nonce=nonce)
    run = replace(run, earlier=earlier, accepted=earlier.accepted)
    parts = list_parts(uri)
    if storage.exists(storage.join(uri, RUN_FILE)):
        found = read_run_file(uri)
        return resume_or_replace(
            run, found, lambda: resume_run(run, found, everything=everything.fields, accept=accept)
        )
    if parts:  # listed before run.json is looked for, so that another driver starting now causes no false alarm
        raise RefusedError(
            f"{uri} has {len(parts)} parts in data/ and no {RUN_FILE}: whose rows they are cannot be known. Choose a "
            "new output.uri, or move the old parts away"
        )
    return run


def pending_shards(run: Run) -> list[int]:
    """List the shards without a part, or with a part of an older attempt than a retry wants, ascending."""
    done = set(done_shards(run.uri, run.least_attempts))
    return [index for index in range(run.num_shards) if index not in done]


def done_shards(run_uri: str, least_attempts: Mapping[int, int]) -> list[int]:
    """List the shards whose part is published, in an attempt that is recent enough for a retry, ascending."""
    done = list_parts(run_uri)
    retried = [index for index in done if index in least_attempts]
    found = zip(retried, part_attempts(run_uri, retried), strict=True)
    stale = {index for index, attempt in found if attempt < least_attempts[index]}
    return [index for index in done if index not in stale]


def unfinish(run: Run) -> None:
    """Delete ``_RUN.json`` if it exists: parts are pending again, so that its totals will be wrong."""
    storage.delete(storage.join(run.uri, FINISHED_FILE))


def finish(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Write ``_RUN.json``: totals of all parts, cost and devices of all sessions, digests, versions and the summary.

    Raises:
        StorageError: a shard has no part yet.
    """
    if pending := pending_shards(run):
        raise StorageError(
            f"{run.uri}: {len(pending)} shards have no part yet, the first is {pending[0]}; not finished"
        )
    run.check_ownership()
    storage.sweep_temporaries(run.uri)
    versions = {key: value for key, value in run.config_fingerprint.fields.items() if key.startswith("versions.")}
    versions["versions.illava"] = __version__
    totals = run_totals(run.uri, range(run.num_shards))
    record = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": run.fingerprint,
        "recipe_digest": run.config_fingerprint.digest,
        "manifest_digest": run.manifest.digest,
        "attempt": run.attempt,
        "num_items": len(run.manifest),
        "num_shards": run.num_shards,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "accepted": [asdict(one) for one in read_accepted(run.uri)],
        "totals": totals.as_dict(),
        "cost": cost_record(run.uri, totals.sums["cost_usd"]),
        "placements": run_placements(run.uri),
        "summary": summary,
    }
    storage.write_atomic(storage.join(run.uri, FINISHED_FILE), json.dumps(record, indent=2, sort_keys=True).encode())
    return record


def resume_run(
    run: Run, found: dict[str, Any], *, everything: Mapping[str, Any] | None = None, accept: Collection[str] = ()
) -> Run:
    """Resume the run in the folder if it is the same run; the recorded digests are kept.

    Args:
        run: as this job would create it.
        found: content of ``run.json``.
        everything: fields of the job's fingerprint with all packages; the run's own where left out.
        accept: keys in which the run may differ, as `plan_run` takes them.

    Raises:
        RefusedError: the folder holds another run (the message names the keys that differ, with both values), or its
            record was edited.
        ConfigError: as `plan_run`.
    """
    if wrong := wrong_digests(found):
        raise RefusedError(
            f"{storage.join(run.uri, RUN_FILE)} was edited: {'; '.join(wrong)}. Put the file back as it was, or choose "
            "a new output.uri"
        )
    recorded = recorded_config_fingerprint(found)
    run = _in_dtype(run, recorded.get("model.dtype"))
    here = dict(everything or {}) | run.config_fingerprint.fields
    diff, taken = _without_accepted(run, diff_of_kinds(recorded, here, run.manifest.kinds), accept)
    same_input = _has_same_input(run, found)
    if diff or not same_input or found["items_per_shard"] != run.items_per_shard:
        raise OtherRunError(_config_mismatch_message(run, found, diff, same_input=same_input))
    return replace(
        run,
        config_fingerprint=ConfigFingerprint(found["recipe_digest"], found["recipe"]),
        fingerprint=found["fingerprint"],
        plan_digest=recorded_plan_digest(found),
        manifest=read_frozen_manifest(run.uri, found["manifest_digest"]),
        attempt=found["attempt"],
        nonce=found["nonce"],
        least_attempts=wanted_attempts(found),
        retry_only=tuple(found.get("retry_only") or ()),
        resumed=True,
        accepted=(*run.accepted, *taken),
    )


def _without_accepted(
    run: Run, diff: dict[str, tuple[Any, Any]], accept: Collection[str]
) -> tuple[dict[str, tuple[Any, Any]], list[Difference]]:
    """Return what is left of a difference, and what of it is accepted, by this command or by one before."""
    if not diff:
        return diff, []
    refuse_config_keys(accept, diff, run.uri)
    known = {one.identity for one in read_accepted(run.uri)}
    taken = [one for one in differences(diff) if one.key in accept or one.identity in known]
    return {key: both for key, both in diff.items() if key not in {one.key for one in taken}}, taken


def _in_dtype(run: Run, recorded: str | None) -> Run:
    """Return the run with ``model.dtype: auto`` replaced by the dtype that it was created with."""
    if recorded is None or run.config.model.dtype != "auto":
        return run
    model = run.config.model.model_copy(update={"dtype": recorded})
    fields = run.config_fingerprint.fields | {"model.dtype": recorded}
    return replace(
        run,
        config=run.config.model_copy(update={"model": model}),
        config_fingerprint=ConfigFingerprint(digest_of(fields), fields),
    )


def _has_same_input(run: Run, found: dict[str, Any]) -> bool:
    """Whether the folder's manifest holds this job's items; a manifest of an earlier version may lack columns."""
    if found["manifest_digest"] == run.manifest.digest:
        return True
    frozen, mine = read_frozen_manifest(run.uri, found["manifest_digest"]), run.manifest
    if frozen.first_extensions and not run.config.input.manifest:  # media that a listing left out then
        mine = mine.without(LATER_VIDEO_EXTENSIONS + LATER_IMAGE_EXTENSIONS)
    return found["num_items"] == len(mine) and frozen.holds(mine)


def _config_mismatch_message(
    run: Run, found: dict[str, Any], diff: dict[str, tuple[Any, Any]], *, same_input: bool
) -> str:
    """Say why the folder's run is not this job's: name every key that differs, with both values."""
    lines = [f"  {key}: {_short(there)} there, {_short(here)} here" for key, (there, here) in diff.items()]
    if found["items_per_shard"] != run.items_per_shard:
        lines.append(f"  output.items_per_shard: {found['items_per_shard']} there, {run.items_per_shard} here")
    if not same_input:
        lines.append(
            f"  input: {found['num_items']} items there, {len(run.manifest)} here (digest "
            f"{found['manifest_digest'][:12]} there, {run.manifest.digest[:12]} here): objects were added, removed or "
            "changed since the run began, or input.limit, input.pattern or the manifest is another"
        )
    facts = [key for key in diff if not in_config(key)]
    accepting = ""
    if facts and len(lines) == len(facts):
        keys = " ".join(f"--accept {key}" for key in facts)
        accepting = f"To go on with this run all the same, add {keys}, which is recorded in the run. Or put the former "
        accepting += "versions back. Else:\n"
    return (
        f"{run.uri} holds another run; these keys differ:\n" + "\n".join(lines) + "\n" + accepting + ""
        "Choose a new output.uri; to process only what is new, also set input.exclude_runs to the finished run's folder"
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _run_record(run: Run) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": run.fingerprint,
        "recipe_digest": run.config_fingerprint.digest,
        "recipe": run.config_fingerprint.fields,
        "plan_digest": run.plan_digest,
        "manifest_digest": run.manifest.digest,
        "num_items": len(run.manifest),
        "num_shards": run.num_shards,
        "items_per_shard": run.items_per_shard,
        "attempt": run.attempt,
        "nonce": run.nonce,
        "left_out": dict(run.manifest.left_out),
        "input": run.manifest.counts.as_dict() if run.manifest.counts else None,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "driver": this_driver(),
        "config": run.config.model_dump(mode="json"),
    }

"""Erases items of a finished run (`erase_run`): their rows become ``erased``, and their lines of the manifest blank.

What is personal goes: addresses, prompts, options, references, the user's columns, answers, messages. Ids and counts
stay, so that every item still has exactly one row, and no later night computes it again.

An erasure takes durable steps, each of which may be the last before the process is killed:

1. ``erasing.json`` says which items; whoever reads the folder can see that an erasure was interrupted.
2. ``run.json`` gets a new nonce, so that a job or a retry that is at work publishes no older rows any more.
3. ``_RUN.json`` is deleted, since its totals will be wrong.
4. Each part that holds such an item is written anew, whole, under its name; other rows stay to the bit.
5. So is the manifest, which keeps the digest that names the run. ``report.html`` and ``scores.json`` are deleted.
6. ``_RUN.json`` is written, and ``erasing.json`` deleted.

The same command again does what is left: a step that is done changes nothing when it is done once more.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import InputError, ItemError, RefusedError
from pipeline.inputs.manifest import Manifest, manifest_bytes
from pipeline.records import SCHEMA_VERSION
from pipeline.runs.config_fingerprint import ConfigFingerprint
from pipeline.runs.erased_rows import erase_items, erase_rows
from pipeline.runs.parquet_sink import part_name, read_stored, table_bytes
from pipeline.runs.row_schema import version_of
from pipeline.runs.run import done_shards, finish, unfinish
from pipeline.runs.run_folder import Run, is_finished, manifest_uri, read_finished, read_frozen_manifest
from pipeline.runs.run_record import (
    RUN_FILE,
    read_run_file,
    recorded_config,
    recorded_plan_digest,
    wanted_attempts,
    wrong_digests,
)
from pipeline.storage import storage
from pipeline.storage.uris import printable

ERASING_FILE = "erasing.json"
_REPORT_FILE = "report.html"
_SCORES_FILE = "scores.json"


@dataclass(frozen=True, slots=True)
class Erasure:
    """Says what an erasure did.

    Attributes:
        uri: the run folder.
        num_rows: rows that became ``erased`` by this command.
        num_named: items that were named, those erased before among them.
    """

    uri: str
    num_rows: int
    num_named: int


def erase_run(uri: str, items_uri: str) -> Erasure:
    """Erase the items that a file names, or go on with an erasure that was interrupted.

    Args:
        uri: the run folder.
        items_uri: a text with an item's id, or the address of its media, on each line.

    Raises:
        RefusedError: the folder holds no run, or one that is not finished; or its record was edited.
        InputError: the file names no item, or one that the run does not have.
        StorageError: a part cannot be read or written.
    """
    uri = storage.folder_uri(uri)
    lines = _lines(items_uri)
    run = _recorded_run(uri)
    begun = _begun(uri)
    named = _resolve(run.manifest, lines, begun.get("items", {}))
    item_ids = {name for names in named.values() for name in names}
    shards = _shards(run, item_ids)
    _check_parts(run, shards)
    storage.sweep_temporaries(uri)
    summary = begun.get("summary") or (read_finished(uri).get("summary", {}) if is_finished(uri) else {})
    _write_json(storage.join(uri, ERASING_FILE), {"items": named, "summary": summary})
    run = _taken_over(run)
    unfinish(run)
    num_rows = sum(_erase_part(run, index, item_ids) for index in shards)
    manifest = replace(run.manifest, table=erase_items(run.manifest.table, item_ids), is_erased=True)
    run.check_ownership()
    storage.write_atomic(manifest_uri(uri, manifest.digest), manifest_bytes(manifest))
    for name in (_REPORT_FILE, _SCORES_FILE):  # made of all rows; the next command makes them again
        storage.delete(storage.join(uri, name))
    finish(replace(run, manifest=manifest), summary)
    storage.delete(storage.join(uri, ERASING_FILE))
    return Erasure(uri, num_rows, len(item_ids))


def is_being_erased(uri: str) -> bool:
    """Whether an erasure of the run was begun and not ended."""
    return storage.exists(storage.join(uri, ERASING_FILE))


def _lines(items_uri: str) -> list[str]:
    try:
        text = storage.read(items_uri).decode("utf-8-sig")
    except ItemError as error:
        raise InputError(f"--items: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--items {items_uri}: not UTF-8; save it as UTF-8") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"--items {items_uri} names no item; write an item's id, or its media's address, on each line")
    return lines


def _recorded_run(uri: str) -> Run:
    """The run as its own record has it: neither its model nor its input need be there any more."""
    record = read_run_file(uri)
    if wrong := wrong_digests(record):
        raise RefusedError(f"{storage.join(uri, RUN_FILE)} was edited: {'; '.join(wrong)}. Put the file back as it was")
    num_done = len([one for one in done_shards(uri, wanted_attempts(record)) if one < record["num_shards"]])
    if num_done < record["num_shards"]:
        command = f"`illava retry {uri}`" if record["attempt"] > 1 else "the job's own command"
        raise RefusedError(
            f"{uri}: {record['num_shards'] - num_done} of {record['num_shards']} parts are still to be computed, and "
            f"would be computed with these items; finish the run first, with {command}, or delete the folder"
        )
    return Run(
        uri=uri,
        config=recorded_config(record, source=f"the configuration in {storage.join(uri, RUN_FILE)}"),
        config_fingerprint=ConfigFingerprint(record["recipe_digest"], record["recipe"]),
        fingerprint=record["fingerprint"],
        plan_digest=recorded_plan_digest(record),
        manifest=read_frozen_manifest(uri, record["manifest_digest"]),
        items_per_shard=record["items_per_shard"],
        attempt=record["attempt"],
        nonce=record["nonce"],
        least_attempts=wanted_attempts(record),
    )


def _begun(uri: str) -> dict[str, Any]:
    if not is_being_erased(uri):
        return {}
    found: dict[str, Any] = json.loads(storage.read(storage.join(uri, ERASING_FILE)))
    return found


def _resolve(manifest: Manifest, lines: Sequence[str], begun: dict[str, list[str]]) -> dict[str, list[str]]:
    """Map each line to the ids of its items; of an interrupted erasure, all of its lines as well."""
    wanted = dict.fromkeys(line for line in lines if line not in begun)
    found: dict[str, list[str]] = {line: [] for line in wanted}
    for item_id, uris in zip(manifest.item_ids(), manifest.table["uris"].to_pylist(), strict=True):
        for name in {item_id, *uris} & wanted.keys():
            found[name].append(item_id)
    if unknown := [line for line, ids in found.items() if not ids]:
        shown = ", ".join(printable(line, 80) for line in unknown[:3])
        raise InputError(
            f"--items: {len(unknown)} of {len(lines)} lines are neither an item's id nor an address of this run, such "
            f"as {shown}; an address that was erased before is no longer known"
        )
    return {**begun, **found}


def _shards(run: Run, item_ids: Collection[str]) -> list[int]:
    places = (place for place, name in enumerate(run.manifest.item_ids()) if name in item_ids)
    return sorted({place // run.items_per_shard for place in places})


def _check_parts(run: Run, shards: Sequence[int]) -> None:
    """Refuse parts that cannot be written anew, before anything is changed."""
    for index in shards:
        version = version_of(read_stored(_part_uri(run, index)).schema) or SCHEMA_VERSION
        if version > SCHEMA_VERSION:
            raise RefusedError(
                f"{_part_uri(run, index)} has rows of schema version {version}; this program knows {SCHEMA_VERSION}. "
                "Erase with the version that wrote it"
            )


def _taken_over(run: Run) -> Run:
    """Give ``run.json`` a new nonce: who works on the folder publishes nothing more."""
    record, nonce = read_run_file(run.uri), secrets.token_hex(8)
    run.check_ownership()
    _write_json(storage.join(run.uri, RUN_FILE), record | {"nonce": nonce})
    return replace(run, nonce=nonce)


def _erase_part(run: Run, index: int, item_ids: Collection[str]) -> int:
    """Write one part anew, unless it is erased; return how many rows were changed."""
    table, num_rows = erase_rows(read_stored(_part_uri(run, index)), item_ids)
    if num_rows:
        run.check_ownership()
        storage.write_atomic(_part_uri(run, index), table_bytes(table, run.config.output.compression))
    return num_rows


def _part_uri(run: Run, index: int) -> str:
    return storage.join(run.uri, "data", part_name(index))


def _write_json(uri: str, value: dict[str, Any]) -> None:
    storage.write_atomic(uri, json.dumps(value, indent=2, sort_keys=True).encode())

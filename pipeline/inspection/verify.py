"""Checks the invariants of a run folder, from the folder alone (`verify_run`); writes nothing.

ids(rows) = ids(manifest), each once; every part opens and holds its shard; all parts have one fingerprint; failed rows
have an error type; counts and seconds are plausible and sum up; no temporary and no foreign file is left.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import CredentialsError, PipelineError
from pipeline.inputs.manifest import Manifest
from pipeline.inspection.verify_rows import STAGE_SLACK_S, Violation, check_ids, check_row, stages_fit_latency
from pipeline.records import FIRST_SCHEMA_VERSION, SCHEMA_VERSION, UNANSWERED
from pipeline.runs.erase import ERASING_FILE, is_being_erased
from pipeline.runs.parquet_sink import list_parts, part_index, part_name, read_stored
from pipeline.runs.row_schema import SCHEMA, USER_PREFIX, schema_of, to_current_schema, version_of
from pipeline.runs.run_folder import FINISHED_FILE, read_frozen_manifest
from pipeline.runs.run_record import (
    RUN_FILE,
    read_run_file,
    recorded_config_fingerprint,
    recorded_plan_digest,
    wanted_attempts,
    wrong_digests,
)
from pipeline.runs.totals import run_totals
from pipeline.storage import storage

__all__ = ["Violation", "verify_run"]

_EXPECTED_NAMES = re.compile(
    r"^(run\.json|_RUN\.json|data/|sessions/|accepted/|report\.html|scores\.json|erasing\.json"
    r"|manifest-[0-9a-f]{32}\.parquet)$"
)
_LATER_TOTALS = frozenset({"num_empty", "pages"})  # not in the files that earlier versions of the present schema wrote
_NUM_READERS = 8
_MAX_MISFITS = 0.01  # share of answered rows whose stages may miss the latency; one row always may


@dataclass(slots=True)
class _Folder:
    """Collects what was read from the folder so far."""

    uri: str
    record: dict[str, Any]
    manifest: Manifest
    num_answered: int = 0
    misfits: list[str] = field(default_factory=list)

    @property
    def num_shards(self) -> int:
        return -(-len(self.manifest) // self.record["items_per_shard"])


def verify_run(uri: str) -> list[Violation]:
    """Return every invariant that a run folder breaks; empty where all hold.

    Raises:
        CredentialsError: the folder cannot be read.
    """
    uri = storage.folder_uri(uri)
    try:
        record = read_run_file(uri)
    except CredentialsError:
        raise
    except PipelineError as error:
        return [Violation("run_file", RUN_FILE, str(error))]
    found = list(_check_record(record))
    try:
        folder = _Folder(uri, record, read_frozen_manifest(uri, record["manifest_digest"]))
    except CredentialsError:
        raise
    except PipelineError as error:
        return [*found, Violation("manifest", f"manifest-{record['manifest_digest']}.parquet", str(error))]
    found += _check_names(folder)
    readable = []
    for index, table in _tables(folder):
        if isinstance(table, Violation):
            found.append(table)
        else:
            readable.append(index)
            found += _check_part(folder, index, table)
    found += _check_stages(folder)
    found += _check_finished(folder, readable)
    return found


def _check_record(record: dict[str, Any]) -> Iterator[Violation]:
    """Check that the digests in `run.json` fit its content."""
    for wrong in wrong_digests(record):
        yield Violation("fingerprint", RUN_FILE, wrong)


def _check_names(folder: _Folder) -> Iterator[Violation]:
    """Check that no file is temporary or foreign, and that no part is missing."""
    if is_being_erased(folder.uri):
        message = "an erasure was interrupted; `illava erase` with the same --items goes on with it"
        yield Violation("unfinished_erasure", ERASING_FILE, message)
    for path in storage.temporaries(folder.uri):
        yield Violation("temporary_file", path, "an unfinished write was left behind; delete it")
    temporary = {path.rpartition("/")[2] for path in storage.temporaries(folder.uri)}
    for name in storage.list_names(folder.uri):
        if not _EXPECTED_NAMES.match(name) and name not in temporary:
            yield Violation("foreign_object", name, "not written by this program")
    names = [n for n in storage.list_names(storage.join(folder.uri, "data")) if n not in temporary]
    for name in names:
        index = part_index(name)
        if index is None or index >= folder.num_shards:
            yield Violation("foreign_object", f"data/{name}", f"the run has parts 0 to {folder.num_shards - 1}")
    missing = sorted(set(range(folder.num_shards)) - {index for index in map(part_index, names) if index is not None})
    if missing:
        shown = ", ".join(part_name(index) for index in missing[:3])
        yield Violation("missing_part", "data/", f"{len(missing)} of {folder.num_shards} parts, such as {shown}")


def _tables(folder: _Folder) -> Iterator[tuple[int, Any]]:
    """Yield each published part's rows, or why they cannot be read; several parts are read at a time."""
    present = [index for index in list_parts(folder.uri) if index < folder.num_shards]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for start in range(0, len(present), 8 * _NUM_READERS):
            some = present[start : start + 8 * _NUM_READERS]
            yield from zip(some, pool.map(lambda index: _table(folder.uri, index), some), strict=True)


def _table(uri: str, index: int) -> Any:
    where = f"data/{part_name(index)}"
    try:
        table = read_stored(storage.join(uri, where))
    except CredentialsError:
        raise
    except PipelineError as error:
        return Violation("unreadable_part", where, str(error))
    version = version_of(table.schema)
    if version is None or version < FIRST_SCHEMA_VERSION:
        found = "absent" if version is None else version
        message = f"its schema_version is {found}, this program reads {FIRST_SCHEMA_VERSION} to {SCHEMA_VERSION}"
        return Violation("foreign_part", where, message)
    if version > SCHEMA_VERSION:
        message = (
            f"schema version {version}; this program knows {SCHEMA_VERSION}: verify with the version that wrote it"
        )
        return Violation("newer_schema", where, message)
    expected, user = schema_of(version), [name for name in table.column_names if name.startswith(USER_PREFIX)]
    ours = table.drop_columns(user)
    if not ours.schema.equals(expected):
        odd = sorted(set(ours.column_names) ^ set(expected.names)) or "types differ"
        return Violation("wrong_schema", where, f"columns are not those of schema version {version}: {odd}")
    current = to_current_schema(ours, SCHEMA.names)
    for name in user:
        current = current.append_column(name, table[name])
    return current


def _check_part(folder: _Folder, index: int, table: Any) -> Iterator[Violation]:
    """Check that one part belongs to this run and holds its shard's items."""
    where = f"data/{part_name(index)}"
    yield from _check_metadata(folder, index, where, table.schema.metadata or {})
    size = folder.record["items_per_shard"]
    items = {item.item_id: item for item in folder.manifest.slice(index * size, size)}
    rows = table.select(SCHEMA.names).to_pylist()
    user = folder.manifest.user_columns(index * size, size)
    yield from _check_user_columns(where, table, {f"{USER_PREFIX}{name}": column for name, column in user.items()})
    yield from check_ids(where, list(items), [row["item_id"] for row in rows])
    constants = _constants(folder.record) | {"shard_index": index}
    for number, row in enumerate(rows):
        item = items.get(row["item_id"])
        if item is None:
            continue
        yield from check_row(f"{where} row {number}", row, item, constants)
        if row["status"] not in UNANSWERED:
            folder.num_answered += 1
            if not stages_fit_latency(row):
                folder.misfits.append(f"{where} row {number}")


def _check_user_columns(where: str, table: Any, expected: dict[str, Any]) -> Iterator[Violation]:
    """Check that the part has the user's columns, with the manifest's values."""
    found = [name for name in table.column_names if name.startswith(USER_PREFIX)]
    if sorted(found) != sorted(expected):
        odd = sorted(set(found) ^ set(expected))
        yield Violation("wrong_schema", where, f"columns of the user's manifest are missing or foreign: {odd}")
    for name in expected.keys() & set(found):
        if table[name].to_pylist() != expected[name].to_pylist():
            yield Violation("differs_from_manifest", where, f"{name} has other values than the manifest")


def _check_metadata(folder: _Folder, index: int, where: str, metadata: dict[bytes, bytes]) -> Iterator[Violation]:
    record = folder.record
    expected = {
        "run_fingerprint": record["fingerprint"],
        "recipe_digest": record["recipe_digest"],
        "manifest_digest": record["manifest_digest"],
        "shard_index": str(index),
    }
    for key, value in expected.items():
        found = metadata.get(f"illava.{key}".encode(), b"").decode()
        if found != value:
            yield Violation("foreign_part", where, f"its {key} is {found or 'absent'}, this run's is {value}")
    attempt = metadata.get(b"illava.attempt", b"").decode()
    least = wanted_attempts(record).get(index, 1)
    if not attempt.isdigit() or not least <= int(attempt) <= record["attempt"]:
        message = f"it is of attempt {attempt or 'none'}; attempt {least} to {record['attempt']} is expected"
        yield Violation("stale_part", where, f"{message}: a late writer put an older part over a newer one")


def _constants(record: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that have one value in the whole run."""
    config_fingerprint = recorded_config_fingerprint(record)
    return {
        "run_fingerprint": record["fingerprint"],
        "recipe_digest": record["recipe_digest"],
        "model_id": config_fingerprint.get("model.model_id"),
        "model_revision": config_fingerprint.get("model.revision"),
        "plan_digest": recorded_plan_digest(record),
    }


def _check_stages(folder: _Folder) -> Iterator[Violation]:
    if len(folder.misfits) > max(1, _MAX_MISFITS * folder.num_answered):
        message = (
            f"{len(folder.misfits)} of {folder.num_answered} answered rows: stage seconds miss latency_s "
            f"by more than 2 % and {STAGE_SLACK_S * 1000:.0f} ms; at most 1 % may, or one"
        )
        yield Violation("stage_seconds", folder.misfits[0], message)


def _check_finished(folder: _Folder, readable: list[int]) -> Iterator[Violation]:
    """Check that `_RUN.json` exists, belongs to this run, and has the sums of the parts."""
    uri, record = storage.join(folder.uri, FINISHED_FILE), folder.record
    if not storage.exists(uri):
        yield Violation("unfinished", FINISHED_FILE, "absent: run the same command again, it resumes")
        return
    try:
        finished = json.loads(storage.read(uri))
        totals = dict(finished["totals"])
    except (ValueError, KeyError, TypeError) as error:
        yield Violation("finished_file", FINISHED_FILE, f"cannot be read: {type(error).__name__}: {error}")
        return
    expected = {name: record.get(name) for name in ("fingerprint", "recipe_digest", "manifest_digest", "attempt")}
    expected |= {"num_items": len(folder.manifest), "num_shards": folder.num_shards}
    for name, value in expected.items():
        if finished.get(name) != value:
            yield Violation("finished_file", FINISHED_FILE, f"{name} is {finished.get(name)}, this run's is {value}")
    counted = run_totals(folder.uri, readable).as_dict()
    if finished.get("schema_version", 0) < SCHEMA_VERSION:  # an earlier version did not count what later ones do
        counted = _only(totals, counted) | {"sums": _only(totals.get("sums"), counted["sums"])}
    for name, value in counted.items():
        if name in _LATER_TOTALS and name not in totals:
            continue
        if not _same(totals.get(name), value):
            yield Violation("wrong_totals", FINISHED_FILE, f"{name} is {totals.get(name)}, the parts say {value}")


def _only(known: Any, counted: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in counted.items() if isinstance(known, dict) and name in known}


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, float) and isinstance(right, (int, float)):
        return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12)
    return left == right

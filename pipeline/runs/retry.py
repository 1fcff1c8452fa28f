"""Retries a run: computes failed rows again and publishes only their parts again; good rows are kept.

A document counts as failed where the model failed some of its pages. The new row of such a document is used only if it
has lost no more pages than the old one.

A retry takes three durable steps. ``_RUN.json`` is deleted; ``run.json`` is written with a higher attempt and the list
of shards to compute again; the parts are published one by one. Whoever reads the folder can therefore see that a retry
was interrupted: a part of an older attempt than ``run.json`` wants is pending, like a missing part.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from pipeline.errors import ConfigError, ItemError, RefusedError
from pipeline.records import ROW_ERROR_TYPES, SCHEMA_VERSION, ResultRow, Shard
from pipeline.runs.accepted import check_keys
from pipeline.runs.config_fingerprint import resolve_config_fingerprint
from pipeline.runs.parquet_sink import ParquetSink, list_parts, part_name, read_parts, read_rows, result_rows
from pipeline.runs.row_schema import version_of
from pipeline.runs.run import pending_shards, resume_run, unfinish
from pipeline.runs.run_folder import Run, read_frozen_manifest
from pipeline.runs.run_record import RUN_FILE, fingerprint_of, read_run_file, recorded_config
from pipeline.storage import storage

_FIXED_KEYS = ("name", "input", "output.uri", "output.items_per_shard")
_FREE_KEYS = frozenset({"input.follow_links"})  # within those


def begin_retry(
    uri: str, *, only: Collection[str] = (), overrides: Sequence[str] = (), accept: Collection[str] = ()
) -> Run:
    """Begin a run's next attempt, or resume an interrupted one; its shards are then pending.

    Where nothing failed, the run is returned unchanged.

    Args:
        uri: the run folder.
        only: error types to compute again, of rows or of a document's pages. If empty: all types, except those of pages
            that could not be rendered. An interrupted retry keeps its own types.
        overrides: ``a.b=value`` on the frozen configuration, for keys that change no row.
        accept: keys in which the run may differ from this machine, as `pipeline.runs.run.plan_run` takes them.

    Raises:
        ConfigError: there is no such error type, or an override names a key that a run fixes.
        RefusedError: the folder holds no run, parts are missing, or rows would now be made in another way (the message
            names the keys that differ).
    """
    unknown = sorted(set(only) - set(ROW_ERROR_TYPES))
    if unknown:
        raise ConfigError(f"--only: {', '.join(unknown)} is no error type; there are {', '.join(ROW_ERROR_TYPES)}")
    uri = storage.folder_uri(uri)
    run = _open(uri, overrides, accept)
    missing = run.num_shards - sum(index < run.num_shards for index in list_parts(uri))
    if missing:
        raise RefusedError(
            f"{uri}: {missing} of {run.num_shards} parts are missing; finish the run first, with the job's own command"
        )
    if pending_shards(run):
        return run
    shards = [index for index, count in _count_failed(run, range(run.num_shards), only) if count]
    if not shards:
        return run
    unfinish(run)
    record = read_run_file(uri)
    run.check_ownership()
    attempt = run.attempt + 1
    retried = (record.get("retried_shards") or {}) | {str(attempt): shards}
    record |= {"attempt": attempt, "nonce": secrets.token_hex(8), "retried_shards": retried, "retry_only": sorted(only)}
    storage.write_atomic(storage.join(uri, RUN_FILE), json.dumps(record, indent=2, sort_keys=True).encode())
    return _open(uri, overrides, accept)


class RetrySink:
    """Publishes the shards of a retry: the computed rows, and the rows that a shard keeps from its older part.

    Args:
        run: the run, opened for this attempt.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._whole = ParquetSink(run)
        self._kept: dict[int, list[ResultRow]] = {}
        self._partial: dict[int, dict[str, ResultRow]] = {}

    def open_shard(self, index: int) -> Shard:
        """Return the shard's items that must be computed; to be called once for each pending shard."""
        shard = self._whole.open_shard(index)
        if index not in self._run.least_attempts:
            return shard
        old, again = self._old_rows(index), _is_retried(self._run.retry_only)
        kept = [row for row in old if not again(row.status, row.error_type, row.pages)]
        self._kept[index] = kept
        self._partial[index] = {row.item_id: row for row in old if row.status == "partial"}
        done = {row.item_id for row in kept}
        return Shard(index, tuple(item for item in shard.items if item.item_id not in done))

    def count_items(self, shards: Sequence[int]) -> int:
        """Count the items to compute before these pending shards can be published.

        These are all items of a shard, or the failed ones where an older part is published.
        """
        run = self._run
        older = sorted(set(list_parts(run.uri)) & run.least_attempts.keys() & set(shards))
        failed = sum(count for _, count in _count_failed(run, older, run.retry_only))
        return failed + self._whole.count_items([index for index in shards if index not in older])

    def publish(self, shard_index: int, rows: Sequence[ResultRow]) -> str:
        """Publish the computed rows as `ParquetSink.publish` does; of a document, keep the row with more pages."""
        partial = self._partial.pop(shard_index, {})
        best = [min(row, partial.get(row.item_id, row), key=_num_lost_pages) for row in rows]
        return self._whole.publish(shard_index, [*self._kept.pop(shard_index, ()), *best])

    def _old_rows(self, index: int) -> list[ResultRow]:
        uri = storage.join(self._run.uri, "data", part_name(index))
        try:
            table = read_rows(uri)
        except ItemError as error:
            if error.error_type != "not_found":
                raise
            return []  # the part was deleted by hand: the whole shard is computed
        if (version := version_of(table.schema) or SCHEMA_VERSION) > SCHEMA_VERSION:
            raise RefusedError(
                f"{uri} has rows of schema version {version}; this program knows {SCHEMA_VERSION} and would lose "
                "columns it does not know. Retry with the version that wrote it"
            )
        return result_rows(table)


def _open(uri: str, overrides: Sequence[str], accept: Collection[str]) -> Run:
    """Open the run with its frozen manifest, even if its input has changed since."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        fixed = any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED_KEYS)
        if fixed and key not in _FREE_KEYS:
            raise ConfigError(f"--set {key}: a retry works on the run's own items, shards and folder; leave it out")
    record = read_run_file(uri)
    config = recorded_config(record, overrides, source=f"the configuration in {storage.join(uri, RUN_FILE)}")
    config = config.model_copy(update={"output": config.output.model_copy(update={"uri": uri})})
    everything, items_per_shard = resolve_config_fingerprint(config), record["items_per_shard"]
    check_keys(accept, everything.fields)
    manifest = read_frozen_manifest(uri, record["manifest_digest"])
    config_fingerprint = everything.of_kinds(manifest.kinds)
    fingerprint = fingerprint_of(config_fingerprint.digest, manifest.digest, items_per_shard)
    storage.sweep_temporaries(uri)
    run = Run(uri, config, config_fingerprint, fingerprint, config.reduction.digest(), manifest, items_per_shard)
    return resume_run(run, record, everything=everything.fields, accept=accept)


def _is_retried(only: Collection[str]) -> Callable[[str, str | None, Sequence[dict[str, Any]] | None], bool]:
    """Return a function of a row's status, error type and pages that says whether the row is computed again."""

    def again(status: str, error_type: str | None, pages: Sequence[dict[str, Any]] | None) -> bool:
        failed = [page for page in pages or () if page["status"] == "failed"]
        if only:
            return not {error_type, *(page["error_type"] for page in failed)}.isdisjoint(only)
        # A page without a window could not be rendered: a retry would fail again, and cost the document's good pages.
        return status == "failed" or any(page["window"] is not None for page in failed)

    return again


def _num_lost_pages(row: ResultRow) -> float:
    return math.inf if row.status == "failed" else sum(page["status"] == "failed" for page in row.pages or ())


def _count_failed(run: Run, indexes: Sequence[int], only: Collection[str]) -> Iterator[tuple[int, int]]:
    again = _is_retried(only)
    columns = ["status", "error_type", "pages"]
    for index, table in zip(indexes, read_parts(run.uri, indexes, columns), strict=True):
        yield index, sum(map(again, *(table[name].to_pylist() for name in columns)))

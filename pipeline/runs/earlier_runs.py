"""Finds the items that earlier runs have done under the same config fingerprint, for incremental runs.

``input.exclude_runs`` names one run's folder, or a folder of incremental runs. Only parts are read. A run need not be
finished: a part is published whole or not at all, so its rows are done. An item whose medium is broken, and still the
same, would only fail again: it is left out too, and ``illava retry`` of that run is how to try it once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.schema import JobConfig
from pipeline.errors import InputError
from pipeline.inputs.permanent_failures import permanent_types
from pipeline.runs.config_fingerprint import ConfigFingerprint, resolve_config_fingerprint
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.runs.run_record import config_diff, read_run_file, recorded_config_fingerprint
from pipeline.storage import storage

_COLUMNS = ["item_id", "status", "error_type", "media_etag", "recipe_digest"]
_DONE = ("ok", "partial")  # a truncated file stays truncated until its etag, and with it the item, changes


@dataclass(frozen=True, slots=True)
class DoneItems:
    """Holds the items that need not be processed again.

    Attributes:
        item_ids: items with an answer under the given config fingerprint; an id may come from several runs.
        num_runs: number of earlier runs that were read.
        failed: items that would only fail again -> what the medium's ETag was then; None where it was not known.
    """

    item_ids: list[str]
    num_runs: int
    failed: Mapping[str, str | None] = field(default_factory=dict)


def done_ids(config: JobConfig, config_fingerprint: ConfigFingerprint | None = None) -> list[str]:
    """Return the items that a job's ``input.exclude_runs`` leaves out; empty where the key is not set.

    Args:
        config: the job.
        config_fingerprint: the job's config fingerprint; resolved from ``config`` if left out.

    Raises:
        InputError: as `done_items`.
    """
    return earlier_items(config, (config_fingerprint or resolve_config_fingerprint(config)).fields).item_ids


def earlier_items(config: JobConfig, fields: Mapping[str, Any]) -> DoneItems:
    """Return what the runs in a job's ``input.exclude_runs`` have done, and what failed there for good.

    Args:
        config: the job.
        fields: of its config fingerprint.

    Raises:
        InputError: as `done_items`.
    """
    if not config.input.exclude_runs:
        return DoneItems([], 0)
    return done_items(config.input.exclude_runs, fields, own_run_uri=config.output.uri, config=config)


def done_items(
    uri: str, config_fingerprint: Mapping[str, Any], *, own_run_uri: str, config: JobConfig | None = None
) -> DoneItems:
    """Find the items that earlier runs hold with status ok or partial under this config fingerprint.

    Args:
        uri: a run folder, or a folder of run folders.
        config_fingerprint: fields of the present job's config fingerprint; rows under another one do not count.
        own_run_uri: the present job's run; its own parts do not count. Where it lies directly in ``uri``, no earlier
            run is needed: it may be the first of the incremental runs.
        config: the present job, which decides what would only fail again; nothing where left out.

    Raises:
        InputError: ``uri`` holds no run, and the present job's run does not lie in it.
    """
    # Compared in normal form: a run that took its own parts for another's would change its manifest and not resume.
    own, earlier = (storage.check_uri(one).rstrip("/") for one in (own_run_uri, uri))
    runs = [run for run in _runs(earlier) if run != own]
    if not runs and own.rpartition("/")[0] != earlier:
        raise InputError(
            f"input.exclude_runs: {uri} holds no run, neither itself nor one folder deeper (no run.json); name an "
            "earlier output.uri, or the folder in which the output.uri of every incremental run lies"
        )
    item_ids: list[str] = []
    failed: dict[str, str | None] = {}
    for run in runs:
        item_ids += _done_in(run, config_fingerprint, failed, config)
    answered = set(item_ids)
    return DoneItems(item_ids, len(runs), {name: etag for name, etag in failed.items() if name not in answered})


def _runs(uri: str) -> list[str]:
    names = storage.list_names(uri)
    if "run.json" in names:
        return [uri]
    folders = [storage.join(uri, name.rstrip("/")) for name in names if name.endswith("/")]
    return [folder for folder in folders if storage.exists(storage.join(folder, "run.json"))]


def _done_in(
    run_uri: str, config_fingerprint: Mapping[str, Any], failed: dict[str, str | None], config: JobConfig | None
) -> Iterator[str]:
    """Yield a run's answered items; put those that failed for good into ``failed``."""
    record = read_run_file(run_uri)
    if config_diff(recorded_config_fingerprint(record), config_fingerprint):
        return
    for_good = permanent_types(record.get("config") or {}, config) if config is not None else frozenset()
    for table in read_parts(run_uri, list_parts(run_uri), _COLUMNS):
        for row in table.to_pylist():
            if row["recipe_digest"] != record["recipe_digest"]:
                continue
            if row["status"] in _DONE:
                yield row["item_id"]
            elif row["error_type"] in for_good:
                failed[row["item_id"]] = row["media_etag"]

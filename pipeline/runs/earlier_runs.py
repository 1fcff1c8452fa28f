"""Finds the items that earlier runs have done under the same config fingerprint, for incremental runs.

``input.exclude_runs`` names one run's folder, or a folder of incremental runs. Only parts are read. A run need not be
finished: a part is published whole or not at all, so its rows are done. A run that was made in another way is passed
over, for the kinds of media whose rows this can change, and it is said by which keys. An item whose medium is broken,
and still the same, would only fail again: it is left out too, and ``illava retry`` of that run tries it once more.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from pipeline.config.schema import JobConfig
from pipeline.errors import InputError
from pipeline.inputs.permanent_failures import permanent_types
from pipeline.runs.accepted import Difference, DoneItems, PassedOver, differences, read_accepted
from pipeline.runs.config_fingerprint import MEDIA_KINDS, ConfigFingerprint, resolve_config_fingerprint
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.runs.run_record import diff_of_kinds, read_run_file, recorded_config_fingerprint
from pipeline.storage import storage

logger = logging.getLogger(__name__)
_COLUMNS = ["item_id", "status", "error_type", "media_etag", "recipe_digest", "media_kind"]
_DONE = ("ok", "partial", "erased")  # a truncated file stays truncated until its etag, and with it the item, changes
_Diffs = dict[str, list[Difference]]  # kind of media -> by what its rows are made in another way


def done_ids(config: JobConfig, config_fingerprint: ConfigFingerprint | None = None) -> list[str]:
    """Return the items that a job's ``input.exclude_runs`` leaves out; empty where the key is not set.

    Args:
        config: the job.
        config_fingerprint: the job's config fingerprint; resolved from ``config`` if left out.

    Raises:
        InputError: as `done_items`.
    """
    return earlier_items(config, (config_fingerprint or resolve_config_fingerprint(config)).fields).item_ids


def earlier_items(config: JobConfig, fields: Mapping[str, Any], *, accept: Collection[str] = ()) -> DoneItems:
    """Return what the runs in a job's ``input.exclude_runs`` have done, and which of them are passed over.

    Args:
        config: the job.
        fields: of its config fingerprint, with all packages.
        accept: keys in which an earlier run may differ.

    Raises:
        InputError: as `done_items`.
    """
    if not config.input.exclude_runs:
        return DoneItems()
    own = config.output.uri
    return done_items(config.input.exclude_runs, fields, own_run_uri=own, accept=accept, config=config)


def done_items(
    uri: str,
    config_fingerprint: Mapping[str, Any],
    *,
    own_run_uri: str,
    accept: Collection[str] = (),
    config: JobConfig | None = None,
) -> DoneItems:
    """Find the items that earlier runs hold with status ok or partial under this config fingerprint.

    Args:
        uri: a run folder, or a folder of run folders.
        config_fingerprint: fields of the present job's config fingerprint; rows under another one do not count.
        own_run_uri: the present job's run; its own parts do not count. Where it lies directly in ``uri``, no earlier
            run is needed: it may be the first of the incremental runs.
        accept: keys in which an earlier run may differ.
        config: the present job, which decides what would only fail again; nothing where left out.

    Raises:
        InputError: ``uri`` holds no run, and the present job's run does not lie in it.
    """
    # Compared in normal form: a run that took its own parts for another's would change its manifest and not resume.
    own, earlier = (storage.folder_uri(one) for one in (own_run_uri, uri))
    runs = [run for run in list_runs(earlier) if run != own]
    if not runs and own.rpartition("/")[0] != earlier:
        raise InputError(
            f"input.exclude_runs: {uri} holds no run, neither itself nor one folder deeper (no run.json); name an "
            "earlier output.uri, or the folder in which the output.uri of every incremental run lies"
        )
    records = {run: read_run_file(run) for run in runs}
    fingerprints = {run: recorded_config_fingerprint(record) for run, record in records.items()}
    diffs = {run: _by_kind(there, config_fingerprint) for run, there in fingerprints.items()}
    known = _accepted_before(own, diffs)
    item_ids: list[str] = []
    failed: dict[str, str | None] = {}
    passed_over: list[PassedOver] = []
    accepted: dict[str, Difference] = {}
    for run, by_kind in diffs.items():
        taken, left = _taken(by_kind, accept, known)
        counted = [kind for kind, found in left.items() if not found]
        ids, others = _done_in(run, records[run], counted, failed, config)
        for kind, some in ids.items():
            item_ids += some
            accepted |= {one.identity: one for one in taken[kind]}
        if others or not counted:
            concerned = {one.identity: one for kind in others or left for one in left[kind]}
            num_rows = others.total() if counted else None
            passed_over.append(PassedOver(run, tuple(concerned.values()), num_rows))
    for name in item_ids:
        failed.pop(name, None)
    return DoneItems(item_ids, len(runs), tuple(passed_over), tuple(accepted.values()), failed)


def say_earlier_runs(found: DoneItems) -> list[str]:
    """Say how many earlier runs there are, and which differences pass how many of them over, in lines."""
    runs = f"{found.num_runs:,} run{'s' * (found.num_runs != 1)}"
    lines = [f"{runs}, {len(found.passed_over):,} passed over"]
    counts = Counter(one for run in found.passed_over for one in map(str, run.differences))
    lines += [f"passed over: {text} ({count:,} run{'s' * (count != 1)})" for text, count in counts.most_common(8)]
    if len(counts) > 8:
        lines.append(f"passed over: {len(counts) - 8:,} more differences")
    if found.passed_over:
        first = found.passed_over[0].differences
        lines.append(
            "their items are computed again; to take their rows: " + " ".join(f"--accept {d.key}" for d in first)
        )
    return lines


def log_differences(found: DoneItems, accepted: Iterable[Difference]) -> None:
    """Log which earlier runs are passed over and why, and what is accepted; nothing where there is neither."""
    for line in say_earlier_runs(found) if found.passed_over else []:
        logger.warning("earlier runs: %s", line)
    for one in accepted:
        logger.info("accepted, and recorded in the run: %s", one)


def _by_kind(there: Mapping[str, Any], here: Mapping[str, Any]) -> _Diffs:
    return {kind: differences(diff_of_kinds(there, here, {kind})) for kind in sorted(MEDIA_KINDS)}


def _accepted_before(own: str, diffs: Mapping[str, _Diffs]) -> set[str]:
    """Return the differences that the present run, or an earlier one that was made as it is, has accepted."""
    if not any(any(by_kind.values()) for by_kind in diffs.values()):
        return set()
    alike = [run for run, by_kind in diffs.items() if not all(by_kind.values())]
    return {one.identity for run in (own, *alike) for one in read_accepted(run)}


def list_runs(uri: str) -> list[str]:
    """List the run that a folder is, or those that lie directly in it."""
    names = storage.list_names(uri)
    if "run.json" in names:
        return [uri]
    folders = [storage.join(uri, name.rstrip("/")) for name in names if name.endswith("/")]
    return [folder for folder in folders if storage.exists(storage.join(folder, "run.json"))]


def _taken(by_kind: _Diffs, accept: Collection[str], known: Collection[str]) -> tuple[_Diffs, _Diffs]:
    """Part the differences into those that are accepted and the others."""
    taken = {
        kind: [one for one in found if one.key in accept or one.identity in known] for kind, found in by_kind.items()
    }
    return taken, {kind: [one for one in found if one not in taken[kind]] for kind, found in by_kind.items()}


def _done_in(
    run_uri: str,
    record: Mapping[str, Any],
    kinds: Collection[str],
    failed: dict[str, str | None],
    config: JobConfig | None,
) -> tuple[dict[str, list[str]], Counter[str]]:
    """Return a run's done items of these kinds, by kind, and how many it has of others; reads nothing for no kind.

    Items of these kinds that failed for good are put into ``failed``.
    """
    item_ids: dict[str, list[str]] = {}
    others = Counter[str]()
    for_good = frozenset[str]() if config is None else permanent_types(record.get("config") or {}, config)
    for row in _rows(run_uri, record["recipe_digest"]) if kinds else ():
        kind, item_id = row["media_kind"], row["item_id"]
        if row["status"] not in _DONE:
            if kind in kinds and row["error_type"] in for_good:
                failed[item_id] = row["media_etag"]
        elif kind in kinds:
            item_ids.setdefault(kind, []).append(item_id)
        else:
            others[kind] += 1
    return item_ids, others


def _rows(run_uri: str, recipe_digest: str) -> Iterator[dict[str, Any]]:
    for table in read_parts(run_uri, list_parts(run_uri), _COLUMNS):
        for row in table.to_pylist():
            if row["recipe_digest"] == recipe_digest:
                yield row

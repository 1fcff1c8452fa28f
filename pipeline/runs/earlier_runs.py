"""Which items earlier runs have done under a recipe: one run's folder, or a dataset folder with a run per night.

Reads parts, writes nothing. A run need not be finished: a part is there whole or not at all, so its rows are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import JobConfig
from pipeline.errors import InputError
from pipeline.runs.config_fingerprint import ConfigFingerprint, resolve_config_fingerprint
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.runs.run_record import config_diff, read_run_file, recorded_config_fingerprint
from pipeline.storage import storage

_DONE = ("ok", "partial")  # a truncated medium stays truncated until its etag, and so its item, changes


@dataclass(frozen=True, slots=True)
class DoneItems:
    """What need not be done again.

    Attributes:
        item_ids: with a text, under the recipe asked for; one may stand in several runs.
        num_runs: earlier runs that were read.
    """

    item_ids: list[str]
    num_runs: int


def done_ids(config: JobConfig, config_fingerprint: ConfigFingerprint | None = None) -> list[str]:
    """Items that ``input.exclude_runs`` of a job leaves out; empty where it names nothing.

    Args:
        config: of the job.
        config_fingerprint: of the job; taken from the config if left out.

    Raises:
        InputError: as `done_items`.
    """
    if not config.input.exclude_runs:
        return []
    fields = (config_fingerprint or resolve_config_fingerprint(config)).fields
    return done_items(config.input.exclude_runs, fields, own_run_uri=config.output.uri).item_ids


def done_items(uri: str, config_fingerprint: Mapping[str, Any], *, own_run_uri: str) -> DoneItems:
    """Items that earlier runs hold with status ok or partial under this recipe.

    Args:
        uri: a run folder, or a folder of run folders.
        config_fingerprint: of the job that asks, its fields; rows of another one do not count.
        own_run_uri: the run that asks; its own parts do not count. Where it lies directly in ``uri``, no earlier run
            is needed: that is the first night.

    Raises:
        InputError: no run is there, and none is about to be.
    """
    # In normal form: a run that took its own parts for another's would change its manifest and not resume.
    own, earlier = (storage.check_uri(one).rstrip("/") for one in (own_run_uri, uri))
    runs = [run for run in _runs(earlier) if run != own]
    if not runs and own.rpartition("/")[0] != earlier:
        raise InputError(
            f"input.exclude_runs: {uri} holds no run, neither itself nor one folder deeper (no run.json); name an "
            "earlier output.uri, or the folder in which each night's output.uri lies"
        )
    return DoneItems([item_id for run in runs for item_id in _done_in(run, config_fingerprint)], len(runs))


def _runs(uri: str) -> list[str]:
    names = storage.list_names(uri)
    if "run.json" in names:
        return [uri]
    folders = [storage.join(uri, name.rstrip("/")) for name in names if name.endswith("/")]
    return [folder for folder in folders if storage.exists(storage.join(folder, "run.json"))]


def _done_in(run_uri: str, config_fingerprint: Mapping[str, Any]) -> Iterator[str]:
    record = read_run_file(run_uri)
    if config_diff(recorded_config_fingerprint(record), config_fingerprint):
        return
    for table in read_parts(run_uri, list_parts(run_uri), ["item_id", "status", "recipe_digest"]):
        for row in table.to_pylist():
            if row["status"] in _DONE and row["recipe_digest"] == record["recipe_digest"]:
                yield row["item_id"]

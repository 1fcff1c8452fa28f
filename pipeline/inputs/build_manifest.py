"""Builds the frozen manifest of the user's prefix or manifest file: lists once, validates, and gives ids.

Every check works on whole columns, so that a million rows are planned in seconds; only refused rows are looked at one
by one. The caller passes the ids of items that earlier runs have done.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.prompt_template import template_fields
from pipeline.config.schema import DocumentConfig, JobConfig, QuestionConfig
from pipeline.errors import ConfigError, InputError, ItemError
from pipeline.inputs.columns import as_lists, join_relative, refuse_duplicates, refuse_unsafe
from pipeline.inputs.input_counts import InputCounts
from pipeline.inputs.listing import list_items
from pipeline.inputs.manifest import FIELD_PREFIX, TYPED_PREFIX, Manifest, freeze
from pipeline.inputs.manifest_columns import ManifestColumns
from pipeline.inputs.manifest_file import parse_manifest_file, text_or_null
from pipeline.storage import storage
from pipeline.storage.uris import printable
from pipeline.tasks.base import LISTED_COLUMNS

logger = logging.getLogger(__name__)
_PASSWORDS = "password"  # a column of this module alone


def build_manifest(
    config: JobConfig, *, done_ids: Sequence[str] | None = None, failed: Mapping[str, str | None] | None = None
) -> Manifest:
    """List or read the input, validate it, and freeze it.

    A listing is ordered by URI; a manifest file keeps its order. Done items are left out before ``limit`` counts.

    Args:
        config: the job.
        done_ids: items of earlier runs (`pipeline.runs.earlier_runs.done_ids`), which are left out. Must be given where
            the configuration names ``exclude_runs``.
        failed: items of earlier runs that would only fail again, and their media's ETags; left out while those are.

    Raises:
        ConfigError: the configuration names neither a prefix nor a manifest.
        InputError: there is no item, or rows cannot be used; the message has their line numbers.
        StorageError: the input cannot be listed or read.
    """
    counts = None
    if config.input.manifest:
        columns = _from_file(config, config.input.manifest)
    elif isinstance(config.task, QuestionConfig):
        raise ConfigError("input.manifest: task.kind question needs a manifest with the columns `uri` and `question`")
    elif config.input.uri:
        _check_listed(config.task.prompt_template)
        columns, counts = list_items(config.input.uri, config.input.pattern)
    else:
        raise ConfigError(
            "input: name what to read: `input.uri` (a prefix, such as s3://bucket/videos/) or `input.manifest`"
        )
    followed = config.input.follow_links
    if followed and not os.path.isdir(storage.local_path(followed)):
        raise ConfigError(f"input.follow_links: there is no folder {printable(followed)} on this machine")
    if config.input.exclude_runs and done_ids is None:
        raise ValueError("the config names input.exclude_runs: pass done_ids")
    passwords = columns.pop(_PASSWORDS, None)
    table, num_done = pa.table(columns), 0
    num_videos = pc.sum(pc.equal(table["media_kind"], "video")).as_py()
    if isinstance(config.task, DocumentConfig) and num_videos:
        raise InputError(
            f"task.kind document reads PDFs, TIFFs and images; {num_videos:,} items are videos: narrow input.pattern"
        )
    if done_ids:
        left = _without(table, done_ids)
        table, num_done = left, table.num_rows - left.num_rows
    counts = counts or InputCounts(table.num_rows + num_done, 0)
    again = _still_failing(table, _locked(failed, columns["item_id"], passwords)) if failed else []
    if again:
        logger.info(
            "%d items failed in earlier runs by what their files are, and are left out; `illava retry RUN` tries them",
            len(again),
        )
        table = _without(table, again)
    num_new = table.num_rows
    if config.input.limit is not None:
        table = table.slice(0, config.input.limit)
    counts = replace(
        counts,
        num_items=table.num_rows,
        num_done=num_done,
        num_failing=len(again),
        num_over_limit=num_new - table.num_rows,
    )
    return freeze({n: table[n] for n in table.column_names}, counts=counts)


def _without(table: pa.Table, item_ids: Sequence[str]) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table["item_id"], value_set=pa.array(item_ids, pa.string()))))


def _locked(failed: Mapping[str, str | None], ids: Any, passwords: Any) -> Mapping[str, str | None]:
    """Leave out the failed items that the manifest has a password for, which may be new."""
    if passwords is None:
        return failed
    unlocked = {name for name, password in zip(ids.to_pylist(), passwords.to_pylist(), strict=True) if password}
    return {name: etag for name, etag in failed.items() if name not in unlocked}


def _still_failing(table: pa.Table, failed: Mapping[str, str | None]) -> list[str]:
    """Return the items that failed for good and whose medium has not changed since, as far as that is known."""
    those = table.filter(pc.is_in(table["item_id"], value_set=pa.array(list(failed), pa.string())))
    etags = those["etags"].to_pylist() if "etags" in those.column_names else [()] * those.num_rows
    found = zip(those["item_id"].to_pylist(), etags, strict=True)
    return [name for name, tags in found if not (failed[name] and tags and tags[0] and tags[0] != failed[name])]


def readable_roots(config: JobConfig) -> tuple[str, ...]:
    """Return the local folders below which this job's media may lie once their links are resolved."""
    followed = config.input.follow_links
    return (*media_roots(config), *([storage.local_path(followed)] if followed else []))


def media_roots(config: JobConfig) -> tuple[str, ...]:
    """Return the local folders below which this job's media may be named; empty where all are in object stores."""
    roots = []
    if config.input.uri and storage.is_local(config.input.uri):
        roots.append(storage.local_path(config.input.uri))
    if config.input.manifest and storage.is_local(config.input.manifest):
        roots.append(os.path.dirname(storage.local_path(config.input.manifest)))
    return tuple(roots)


def _check_listed(template: str | None) -> None:
    """Refuse a prompt template that names columns, where the items are listed."""
    names = [name for name in template_fields(template or "") if name not in LISTED_COLUMNS]
    if names:
        raise ConfigError(
            f"task.prompt_template names {', '.join(names)}, and items of input.uri have {', '.join(LISTED_COLUMNS)} "
            "alone; name the media and these columns in a file, and the file in input.manifest"
        )


def _from_file(config: JobConfig, uri: str) -> dict[str, Any]:
    try:
        user = parse_manifest_file(uri, storage.read(uri))
    except ItemError as error:
        if error.error_type != "not_found":
            raise
        raise InputError(f"input.manifest: there is no {printable(uri)}; check the address") from error
    if not len(user.lines):
        raise InputError(f'manifest {uri} has no rows; write one line for each item, such as {{"uri": "clip.mp4"}}')
    source = ManifestColumns(uri, user)
    passwords = source.take_passwords()  # never frozen: `pipeline.inputs.passwords` reads them again for the readers
    for note in source.notes():
        logger.info("note: %s", note)
    base = config.input.uri or uri.rpartition("/")[0] or "."
    flat, counts = source.uris()
    flat = join_relative(flat, storage.check_uri(base))
    refuse_unsafe(flat, counts, media_roots(config), source.refuse)
    columns = {"uris": as_lists(flat, counts), "media_kind": source.kinds(flat, counts), **source.objects(counts)}
    texts = {name: source.take_text(name) for name in ("prompt", "question_id", "category")}
    texts["reference"] = source.take_reference()
    columns |= {name: text_or_null(column) for name, column in texts.items() if column is not None}
    columns["options"] = source.take_texts("options")
    if isinstance(config.task, QuestionConfig):
        source.check_questions(config.task.metric, columns)
    template = config.task.prompt_template
    asked = [] if template is None else source.template_values(template_fields(template), columns)
    columns["item_id"] = source.item_ids(columns, asked)
    refuse_duplicates(columns["item_id"], source.refuse)
    columns[_PASSWORDS] = passwords
    columns |= {f"{FIELD_PREFIX}{name}": column for name, column in source.rest().items()}
    columns |= {f"{TYPED_PREFIX}{name}": column for name, column in source.typed_rest().items()}
    return {name: column for name, column in columns.items() if column is not None}

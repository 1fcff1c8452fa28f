"""Builds the frozen manifest of the user's prefix or manifest file: lists once, validates, and gives ids.

Every check works on whole columns, so that a million rows are planned in seconds; only refused rows are looked at one
by one. The caller passes the ids of items that earlier runs have done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import Any, NoReturn, get_args

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config.schema import DocumentConfig, JobConfig, QuestionConfig
from pipeline.errors import ConfigError, InputError, ItemError
from pipeline.inputs.columns import join_relative, kinds_of, refuse_duplicates, refuse_unsafe, row_kinds
from pipeline.inputs.manifest import FIELD_PREFIX, Manifest, freeze
from pipeline.inputs.manifest_file import UserTable, parse_manifest_file, text_or_null, texts_column
from pipeline.records import MediaKind
from pipeline.storage import storage
from pipeline.storage.uris import printable
from pipeline.tasks.question import question_problem

_ALIASES = {"item_id": "id", "prompt": "question"}
_TEXT_COLUMNS = ("prompt", "question_id", "reference", "category")
_FOR_LISTS = {
    "uri": "name it `uris`, or give one address a row",
    "reference": "write several accepted answers as the text of one JSON array",
}


def build_manifest(config: JobConfig, *, done_ids: Sequence[str] | None = None) -> Manifest:
    """List or read the input, validate it, and freeze it.

    A listing is ordered by URI; a manifest file keeps its order. Done items are left out before ``limit`` counts.

    Args:
        config: the job.
        done_ids: items of earlier runs (`pipeline.runs.earlier_runs.done_ids`), which are left out. Must be given where
            the configuration names ``exclude_runs``.

    Raises:
        ConfigError: the configuration names neither a prefix nor a manifest.
        InputError: there is no item, or rows cannot be used; the message has their line numbers.
        StorageError: the input cannot be listed or read.
    """
    num_unknown = 0
    if config.input.manifest:
        columns = _from_file(config, config.input.manifest)
    elif isinstance(config.task, QuestionConfig):
        raise ConfigError("input.manifest: task.kind question needs a manifest with the columns `uri` and `question`")
    elif config.input.uri:
        columns, num_unknown = _from_listing(config.input.uri, config.input.pattern)
    else:
        raise ConfigError(
            "input: name what to read: `input.uri` (a prefix, such as s3://bucket/videos/) or `input.manifest`"
        )
    if config.input.exclude_runs and done_ids is None:
        raise ValueError("the config names input.exclude_runs: pass done_ids")
    table, num_done = pa.table(columns), 0
    num_videos = pc.sum(pc.equal(table["media_kind"], "video")).as_py()
    if isinstance(config.task, DocumentConfig) and num_videos:
        raise InputError(
            f"task.kind document reads PDFs, TIFFs and images; {num_videos:,} items are videos: narrow input.pattern"
        )
    if done_ids:
        left = table.filter(pc.invert(pc.is_in(table["item_id"], value_set=pa.array(done_ids, pa.string()))))
        table, num_done = left, table.num_rows - left.num_rows
    if config.input.limit is not None:
        table = table.slice(0, config.input.limit)
    return freeze({n: table[n] for n in table.column_names}, num_unknown=num_unknown, num_done=num_done)


def media_roots(config: JobConfig) -> tuple[str, ...]:
    """Return the local folders below which this job's media may lie; empty where all media are in object stores."""
    roots = []
    if config.input.uri and storage.is_local(config.input.uri):
        roots.append(storage.local_path(config.input.uri))
    if config.input.manifest and storage.is_local(config.input.manifest):
        roots.append(os.path.dirname(storage.local_path(config.input.manifest)))
    return tuple(roots)


def _from_listing(uri: str, pattern: str) -> tuple[dict[str, Any], int]:
    found = storage.list_objects(uri, pattern)
    try:
        uris = pa.chunked_array([pa.array([info.uri for info in found], pa.string())])
    except UnicodeEncodeError as error:
        raise InputError(f"input {uri}: a name that is not valid Unicode: {printable(error.object)}") from error
    kinds = kinds_of(uris)
    known = pc.is_valid(kinds)
    num_unknown = len(found) - (pc.sum(known).as_py() or 0)
    if num_unknown == len(found):
        seen = f"{len(found)} objects, none with a known media extension" if found else "no objects"
        raise InputError(f"input {uri} with pattern {pattern!r}: {seen}; check input.uri and input.pattern")
    sizes = pa.chunked_array([pa.array([info.size for info in found], pa.int64())])
    etags = pa.chunked_array([pa.array([info.etag for info in found], pa.string())])
    uris, kinds, sizes, etags = (column.filter(known) for column in (uris, kinds, sizes, etags))
    ids = _hash_ids(uris.to_pylist(), sizes.to_pylist(), etags.to_pylist(), repeat(""))
    columns = {
        "item_id": ids,
        "uris": _lists_of_one(uris),
        "media_kind": kinds,
        "sizes": _lists_of_one(sizes),
        "etags": _lists_of_one(etags),
    }
    return columns, num_unknown


def _from_file(config: JobConfig, uri: str) -> dict[str, Any]:
    try:
        user = parse_manifest_file(uri, storage.read(uri))
    except ItemError as error:
        if error.error_type != "not_found":
            raise
        raise InputError(f"input.manifest: there is no {printable(uri)}; check the address") from error
    if not len(user.lines):
        raise InputError(f"manifest {uri} has no rows")
    source = _InputColumns(uri, user)
    base = config.input.uri or uri.rpartition("/")[0] or "."
    flat, counts = source.uris()
    flat = join_relative(flat, storage.check_uri(base))
    refuse_unsafe(flat, counts, media_roots(config), source.refuse)
    kinds = source.kinds(flat, counts)
    lists = pa.chunked_array([pa.ListArray.from_arrays(_offsets(counts), flat.combine_chunks())])
    columns = {"uris": lists, "media_kind": kinds, **source.objects(counts)}
    for name in _TEXT_COLUMNS:
        if (column := source.take_text(name)) is not None:
            columns[name] = text_or_null(column)
    columns["options"] = source.take_texts("options")
    if isinstance(config.task, QuestionConfig):
        source.check_questions(config.task.metric, columns)
    columns["item_id"] = source.item_ids(columns)
    refuse_duplicates(columns["item_id"], source.refuse)
    columns |= {f"{FIELD_PREFIX}{name}": column for name, column in source.rest().items()}
    return {name: column for name, column in columns.items() if column is not None}


class _InputColumns:
    """Takes the user's columns one by one; columns that nobody takes become the items' `fields`."""

    def __init__(self, uri: str, user: UserTable) -> None:
        self._uri, self._user, self._left = uri, user, dict(user.columns)

    def refuse(self, rows: list[int], problem: str) -> NoReturn:
        """Raise with the lines of these rows."""
        raise InputError(f"manifest {self._uri}, {self._user.where(rows)}: {problem}")

    def take(self, name: str) -> pa.ChunkedArray | None:
        """Take a column, or its alias, out of the remaining ones; None where there is neither."""
        alias = _ALIASES.get(name)
        if name == "prompt" and name in self._left and alias in self._left:
            raise InputError(
                f"manifest {self._uri}: both columns `prompt` and `question`; they mean the same, keep one"
            )
        column = self._left.pop(name, None)
        return self._left.pop(alias, None) if column is None and alias else column

    def take_text(self, name: str) -> pa.ChunkedArray | None:
        """Take a column of one text per row, or its alias."""
        column = self.take(name)
        self._require_text(name, column)
        return column

    def _require_text(self, name: str, column: pa.ChunkedArray | None) -> None:
        if column is not None and not pa.types.is_string(column.type):
            remedy = _FOR_LISTS.get(name, "give one text a row")
            raise InputError(f"manifest {self._uri}: column `{name}` holds lists; {remedy}")

    def take_texts(self, name: str) -> pa.ChunkedArray | None:
        """Take a column of lists of text."""
        column = self.take(name)
        try:
            return None if column is None else texts_column(column)
        except ValueError as error:
            self.refuse([error.args[0]], f"column `{name}`: {error.args[1]}")

    def uris(self) -> tuple[pa.ChunkedArray, list[int]]:
        """Return all URIs in one column, and the number of URIs in each row."""
        single, several = self.take_text("uri"), self.take_texts("uris")
        if single is not None and several is None:
            empty = pc.fill_null(pc.equal(single, ""), True)
            counts, flat = [1] * len(single), single
        elif single is not None or several is None:
            have = ", ".join(self._user.columns)
            raise InputError(
                f"manifest {self._uri}: give one column, `uri` or `uris` (a list); the columns are: {have}"
            )
        else:
            counts = pc.fill_null(pc.list_value_length(several), 0).to_pylist()
            flat = pa.chunked_array([chunk.flatten() for chunk in several.chunks], pa.string())
            empty = pc.equal(pa.chunked_array([pa.array(counts)]), 0)
        if pc.any(empty).as_py():
            self.refuse([n for n, x in enumerate(empty.to_pylist()) if x], "no URI")
        return flat, counts

    def kinds(self, flat: pa.ChunkedArray, counts: list[int]) -> pa.Array:
        """Return the media kind of each row: the given one, else that of the extension."""
        guessed = kinds_of(flat).to_pylist()
        if len(guessed) != len(counts):
            guessed = row_kinds(guessed, counts)
        given = self.take_text("media_kind")
        if given is not None:
            guessed = [x or y for x, y in zip(text_or_null(given).to_pylist(), guessed, strict=True)]
        unknown = [row for row, kind in enumerate(guessed) if kind not in get_args(MediaKind)]
        if unknown:
            self.refuse(unknown, f"unknown media kind; add a column `media_kind` with {', '.join(get_args(MediaKind))}")
        wrong = [n for n, kind in enumerate(guessed) if kind != "images" and counts[n] > 1]
        if wrong:
            self.refuse(wrong, "several URIs are an image set: all must be images (media_kind images)")
        return pa.chunked_array([pa.array(guessed, pa.string())])

    def objects(self, counts: list[int]) -> dict[str, pa.ChunkedArray]:
        """Return sizes and entity tags: those of the columns `size` and `etag` beside a column `uri`, else unknown."""
        given = {"size": None, "etag": None}
        if "uri" in self._user.columns:
            given = {name: self.take_text(name) for name in given}
        total = sum(counts)
        sizes: pa.ChunkedArray = pa.chunked_array([pa.array([-1] * total, pa.int64())])
        etags: pa.ChunkedArray = pa.chunked_array([pa.array([""] * total, pa.string())])
        if given["size"] is not None:
            text = pc.fill_null(text_or_null(given["size"]), "-1")
            bad = [n for n, ok in enumerate(pc.match_substring_regex(text, r"^(-1|\d{1,18})$").to_pylist()) if not ok]
            if bad:
                self.refuse(bad, "column `size`: not a number of bytes")
            sizes = text.cast(pa.int64())
        if given["etag"] is not None:
            etags = pc.utf8_trim(pc.fill_null(given["etag"], ""), '"')
        offsets = _offsets(counts)
        return {
            name: pa.chunked_array([pa.ListArray.from_arrays(offsets, column.combine_chunks())])
            for name, column in (("sizes", sizes), ("etags", etags))
        }

    def check_questions(self, metric: str, columns: dict[str, Any]) -> None:
        """Refuse rows that cannot be asked or scored."""
        self._require_text("metric", self._left.get("metric"))
        given = (*(columns.get(name) for name in ("prompt", "options", "reference")), self._left.get("metric"))
        none = [None] * len(self._user.lines)
        lists = [none if column is None else column.to_pylist() for column in given]
        problems = [
            question_problem(metric, prompt=prompt, options=options, reference=reference, metric=of_row)
            for prompt, options, reference, of_row in zip(*lists, strict=True)
        ]
        bad = [row for row, problem in enumerate(problems) if problem]
        if bad:
            self.refuse(bad, problems[bad[0]] or "")

    def item_ids(self, columns: dict[str, Any]) -> pa.ChunkedArray:
        """Return the user's ids, or hashes of URIs, sizes, etags and question."""
        given = self.take_text("item_id")
        if given is not None:
            empty = [n for n, x in enumerate(pc.fill_null(pc.equal(given, ""), True).to_pylist()) if x]
            if empty:
                self.refuse(empty, "an empty item id")
            return given
        none = [None] * len(self._user.lines)
        prompts, questions = (
            none if columns.get(n) is None else columns[n].to_pylist() for n in ("prompt", "question_id")
        )
        texts = (f"{p or ''}\x1f{q or ''}" if p or q else "" for p, q in zip(prompts, questions, strict=True))
        return _hash_ids(columns["uris"].to_pylist(), columns["sizes"].to_pylist(), columns["etags"].to_pylist(), texts)

    def rest(self) -> dict[str, pa.ChunkedArray]:
        """Return the remaining columns as text."""
        return {
            name: column if pa.types.is_string(column.type) else _texts_as_json(column)
            for name, column in self._left.items()
        }


def _hash_ids(uris: Any, sizes: Any, etags: Any, questions: Any) -> pa.ChunkedArray:
    sha256 = hashlib.sha256
    rows = zip(uris, sizes, etags, questions, strict=False)
    ids = [sha256(f"{uri}\x1e{size}\x1e{etag}\x1e{text}".encode()).hexdigest()[:24] for uri, size, etag, text in rows]
    return pa.chunked_array([pa.array(ids, pa.string())])


def _lists_of_one(column: pa.ChunkedArray) -> pa.ChunkedArray:
    flat = column.combine_chunks()
    return pa.chunked_array([pa.ListArray.from_arrays(_offsets([1] * len(flat)), flat)])


def _offsets(counts: list[int]) -> pa.Array:
    return pa.array(accumulate(counts, initial=0), pa.int32())


def _texts_as_json(column: pa.ChunkedArray) -> pa.ChunkedArray:
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])

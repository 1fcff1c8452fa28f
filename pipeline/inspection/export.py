"""Writes a run's rows into files that other programs read: CSV, JSON, JSON lines, Markdown (`export_run`).

The whole file is built in memory, as large as it will be.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal, get_args

from pipeline.errors import InputError
from pipeline.records import ResultRow
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.runs.run_record import read_run_file
from pipeline.storage import storage
from pipeline.storage.uris import is_local, local_path

logger = logging.getLogger(__name__)
Format = Literal["csv", "json", "jsonl", "md"]
FORMATS: tuple[str, ...] = get_args(Format)
Row = Mapping[str, Any]
_COLUMNS = tuple(ResultRow.__slots__)
_IN_TABLE = ("uri", "question_id", "prompt", "text", "answer", "reference", "score", "status", "error_type")
_UNSAFE = re.compile(r"[^\w.-]+")


def export_run(uri: str, file_format: Format, to: str) -> str:
    """Write all published rows of a run, in manifest order; return what was written, in words.

    Args:
        uri: the run folder, finished or not.
        file_format: ``csv``, ``json``, ``jsonl``: every column, one file. In CSV, lists and maps are JSON. ``md``: of a
            run over documents, one file a document with its pages in order; of any other, a table of what was asked
            and answered.
        to: file to write; a folder for the documents of ``md``.

    Raises:
        RefusedError: the folder holds no run.
        InputError: no row is published yet, or ``to`` is a folder where a file is meant, or a file where a folder is.
        StorageError: a part cannot be read, or a file not be written.
    """
    uri = storage.folder_uri(uri)
    record = read_run_file(uri)
    parts = [index for index in list_parts(uri) if index < record["num_shards"]]
    if len(parts) < record["num_shards"]:
        logger.warning(
            "%s: %d of %d parts are published; the others are left out", uri, len(parts), record["num_shards"]
        )
    rows = [dict(row, fields=dict(row["fields"])) for table in read_parts(uri, parts) for row in table.to_pylist()]
    if not rows:
        raise InputError(f"{uri} has no row yet; run its command again, and `illava status {uri}` says how far it is")
    place = local_path(to) if is_local(to) else ""
    if file_format == "md" and record["config"]["task"]["kind"] == "document":
        if os.path.isfile(place):
            raise InputError(f"--to {to} is a file; the run's documents are one file each: give a folder for them")
        return _write_documents(rows, to.rstrip("/"))
    if to.endswith("/") or os.path.isdir(place):
        name = storage.join(to, f"rows.{file_format}")
        raise InputError(f"--to {to} is a folder; {file_format} is one file: give its name, such as --to {name}")
    storage.write_atomic(to, _RENDERERS[file_format](rows).encode())
    return f"{to}: {len(rows):,} rows"


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        values = (row[name] for name in _COLUMNS)
        writer.writerow([_json_line(value) if isinstance(value, list | dict) else value for value in values])
    return text.getvalue()


def _json(rows: Sequence[Row]) -> str:
    return "[\n" + ",\n".join(map(_json_line, rows)) + "\n]\n"


def _jsonl(rows: Sequence[Row]) -> str:
    return "".join(f"{_json_line(row)}\n" for row in rows)


def _json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _table(rows: Sequence[Row]) -> str:
    """A table of the columns in which any row has a value."""
    names = [name for name in _IN_TABLE if any(row[name] not in (None, "") for row in rows)]
    lines = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    text = "" if value is None else str(value).strip()
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


_RENDERERS: dict[str, Callable[[Sequence[Row]], str]] = {"csv": _csv, "json": _json, "jsonl": _jsonl, "md": _table}


def _write_documents(rows: Sequence[Row], folder: str) -> str:
    with_pages = [row for row in rows if row["pages"]]
    for name, row in zip(_names(with_pages), with_pages, strict=True):
        text = "\n\n".join(_page_texts(row["pages"]))
        storage.write_atomic(storage.join(folder, name), f"{text}\n".encode())
    if num_lacking := len(rows) - len(with_pages):
        logger.warning("%d documents could not be opened and have no file", num_lacking)
    return f"{folder}/: {len(with_pages):,} documents"


def _page_texts(pages: Sequence[Row]) -> Iterable[str]:
    """Each window's answer where its first page stands; a failed page is a comment that names its error."""
    for page in pages:
        if page["status"] == "failed":
            yield f"<!-- page {page['page'] + 1}: {page['error_type']} -->"
        elif page["text"] is not None:
            yield page["text"]


def _names(rows: Sequence[Row]) -> list[str]:
    """The documents' own names; where several share one, a digest of the item behind it."""
    stems = [_UNSAFE.sub("_", row["uri"].rsplit("/", 1)[-1].rpartition(".")[0] or row["item_id"]) for row in rows]
    stems = [stem.lstrip(".") or "_" for stem in stems]
    shared = Counter(stem.casefold() for stem in stems)
    digests = [sha256(row["item_id"].encode()).hexdigest()[:12] for row in rows]
    return [
        f"{stem}.md" if shared[stem.casefold()] == 1 else f"{stem}-{digest}.md"
        for stem, digest in zip(stems, digests, strict=True)
    ]

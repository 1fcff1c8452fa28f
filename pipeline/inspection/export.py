"""Writes a run's rows into files that other programs read: CSV, JSON, JSON lines, Markdown (`export_run`).

Rows are read and written part by part, so that memory holds eight parts and not the run.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from pipeline.errors import InputError
from pipeline.inspection.document_files import document_names, document_text
from pipeline.inspection.withheld import columns_without, without
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
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs a cell that begins so
_PARTS = 8


def export_run(uri: str, file_format: Format, to: str, *, leave_out: frozenset[str] = frozenset()) -> str:
    """Write all published rows of a run, in manifest order; return what was written, in words.

    Args:
        uri: the run folder, finished or not.
        file_format: ``csv``, ``json``, ``jsonl``: every column, one file. In CSV, lists and maps are JSON, and a text
            that a spreadsheet would run as a formula has a ``'`` before it. ``md``: of a run over documents, one file a
            document with its pages in order; of any other, a table of what was asked and answered.
        to: file to write; a folder for the documents of ``md``.
        leave_out: kinds of `pipeline.inspection.withheld` that are not written.

    Raises:
        RefusedError: the folder holds no run.
        InputError: no row is published yet, or ``to`` is a folder where a file is meant, or a file where a folder is.
        StorageError: a part cannot be read, or a file not be written.
    """
    uri = storage.folder_uri(uri)
    record = read_run_file(uri)
    parts = [index for index in list_parts(uri) if index < record["num_shards"]]
    if not parts:
        raise InputError(f"{uri} has no row yet; run its command again, and `illava status {uri}` says how far it is")
    place = local_path(to) if is_local(to) else ""
    if file_format == "md" and record["config"]["task"]["kind"] == "document":
        if os.path.isfile(place):
            raise InputError(f"--to {to} is a file; the run's documents are one file each: give a folder for them")
        _tell_missing(uri, len(parts), record["num_shards"])
        return _write_documents(uri, parts, to.rstrip("/"), leave_out)
    if to.endswith("/") or os.path.isdir(place):
        name = storage.join(to, f"rows.{file_format}")
        raise InputError(f"--to {to} is a folder; {file_format} is one file: give its name, such as --to {name}")
    _tell_missing(uri, len(parts), record["num_shards"])
    gone = columns_without(leave_out)
    if file_format == "md":
        chunks = _table(uri, parts, [name for name in _IN_TABLE if name not in gone])
    else:
        chunks = _RENDERERS[file_format](_rows(uri, parts, leave_out), [name for name in _COLUMNS if name not in gone])
    written = _Counted(chunks)
    storage.write_stream(to, written)
    return f"{to}: {written.num_rows:,} rows"


class _Counted:
    """Yields texts as bytes, and counts the rows that they hold."""

    def __init__(self, chunks: Iterable[tuple[str, int]]) -> None:
        self._chunks, self.num_rows = chunks, 0

    def __iter__(self) -> Iterator[bytes]:
        for text, num_rows in self._chunks:
            self.num_rows += num_rows
            yield text.encode()


def _tell_missing(uri: str, num_parts: int, num_shards: int) -> None:
    if num_parts < num_shards:
        logger.warning("%s: %d of %d parts are published; the others are left out", uri, num_parts, num_shards)


def _rows(
    uri: str, parts: Sequence[int], leave_out: frozenset[str] = frozenset(), columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows, some parts at a time."""
    for start in range(0, len(parts), _PARTS):
        for table in read_parts(uri, parts[start : start + _PARTS], columns):
            for row in table.to_pylist():
                if "fields" in row:
                    row["fields"] = dict(row["fields"])
                yield without(row, leave_out)


def _csv(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[tuple[str, int]]:
    yield _csv_line(columns), 0
    for row in rows:
        yield _csv_line([_csv_cell(row[name]) for name in columns]), 1


def _csv_line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)  # so that it quotes both of them in a text
    return text.getvalue().removesuffix("\r\n") + "\n"


def _csv_cell(value: Any) -> Any:
    """Lists and maps are JSON; a text that begins as a formula is text to a spreadsheet too, by a ``'`` before it."""
    if isinstance(value, list | dict):
        return _json_line(value)
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _json(rows: Iterable[Row], _columns: Sequence[str]) -> Iterator[tuple[str, int]]:
    before = "[\n"
    for row in rows:
        yield f"{before}{_json_line(row)}", 1
        before = ",\n"
    yield "\n]\n", 0


def _jsonl(rows: Iterable[Row], _columns: Sequence[str]) -> Iterator[tuple[str, int]]:
    for row in rows:
        yield f"{_json_line(row)}\n", 1


def _json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_RENDERERS: dict[str, Callable[[Iterable[Row], Sequence[str]], Iterator[tuple[str, int]]]] = {
    "csv": _csv,
    "json": _json,
    "jsonl": _jsonl,
}


def _table(uri: str, parts: Sequence[int], columns: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A table of the columns in which any row has a value: the parts are read twice."""
    filled: set[str] = set()
    for row in _rows(uri, parts, columns=columns):
        filled |= {name for name, value in row.items() if value not in (None, "")}
    names = [name for name in columns if name in filled]
    for line in (names, ["---"] * len(names)):
        yield _table_line(line), 0
    for row in _rows(uri, parts, columns=names):
        yield _table_line([_cell(row[name]) for name in names]), 1


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _cell(value: Any) -> str:
    text = "" if value is None else str(value).strip()
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def _write_documents(uri: str, parts: Sequence[int], folder: str, leave_out: frozenset[str]) -> str:
    """Write a file a document; its name is chosen with those of all others in view, so that none takes another's."""
    listed = _rows(uri, parts, columns=["item_id", "uri"])
    names = document_names([(row["item_id"], row["uri"]) for row in listed], by_id="uri" in leave_out)
    num_written = num_lacking = num_erased = 0
    for name, row in zip(names, _rows(uri, parts), strict=True):
        if not row["pages"]:
            num_erased += row["status"] == "erased"
            num_lacking += row["status"] != "erased"
            continue
        storage.write_atomic(storage.join(folder, name), document_text(without(row, leave_out)).encode())
        num_written += 1
    if num_lacking:
        logger.warning("%d documents could not be opened and have no file", num_lacking)
    if num_erased:
        logger.warning("%d documents are erased and have no file", num_erased)
    return f"{folder}/: {num_written:,} documents"

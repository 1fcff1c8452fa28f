"""Reads a user's manifest file (Parquet, JSONL, CSV) as Arrow columns with line numbers.

Columns hold text, or lists of text where the file holds lists; any other value becomes its JSON text. What the columns
mean is `build_manifest`'s to decide.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.inputs.arrow_text import (
    JSON_CONSTANTS,
    TEXT,
    TEXTS,
    TextColumn,
    UnreadableColumnError,
    infer_type,
    json_text,
    read_as_text,
    with_its_type,
)
from pipeline.storage.parquet import read_table
from pipeline.storage.uris import printable

_ENDINGS = (".parquet", ".jsonl", ".ndjson", ".csv")


@dataclass(frozen=True, slots=True)
class UserTable:
    """Holds the columns of a manifest file.

    Attributes:
        columns: text or list-of-text arrays of equal length.
        lines: 1-based line (row for Parquet) of each row, for messages.
        unit: ``line`` or ``row``.
        structured: rows of a text column whose text is the JSON of a list or an object, where there are any.
        typed: the columns that are no text, with their own type.
    """

    columns: dict[str, pa.ChunkedArray]
    lines: Sequence[int]
    unit: str
    structured: dict[str, tuple[int, ...]] = field(default_factory=dict)
    typed: dict[str, pa.ChunkedArray] = field(default_factory=dict)

    def where(self, rows: Sequence[int], limit: int = 5) -> str:
        """Name rows by their lines, such as ``lines 3, 17, 18 and 204 more``."""
        named = ", ".join(str(self.lines[row]) for row in rows[:limit])
        more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
        return f"{self.unit}{'s' * (len(rows) > 1)} {named}{more}"


def parse_manifest_file(name: str, data: bytes) -> UserTable:
    """Parse a file in the format that the ending of its name tells.

    Raises:
        InputError: the ending is unknown, or the file cannot be parsed; the message names the line.
    """
    if name.endswith(".parquet"):
        return _parse_parquet(name, data)
    if not name.endswith(_ENDINGS):
        raise InputError(f"manifest {name}: the name must end in one of {', '.join(_ENDINGS)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"manifest {name}, line {line}: not UTF-8; save the file as UTF-8") from error
    return _parse_csv(name, text) if name.endswith(".csv") else _parse_jsonl(name, text)


def _parse_parquet(name: str, data: bytes) -> UserTable:
    try:
        table = read_table(data)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"manifest {name}: not a readable Parquet file: {error}") from error
    if len(set(table.column_names)) != table.num_columns:
        raise InputError(f"manifest {name}: two columns of one name in {table.column_names}")
    read = {}
    for column in table.column_names:
        try:
            read[column] = read_as_text(table[column])
        except UnreadableColumnError as error:
            raise InputError(f"manifest {name}, column {printable(column)!r}: {error}") from error
    typed = {column: with_its_type(table[column], read[column].values) for column in table.column_names}
    return _user_table(read, typed, range(1, table.num_rows + 1), "row")


def _user_table(
    read: dict[str, TextColumn], typed: dict[str, pa.ChunkedArray], lines: Sequence[int], unit: str
) -> UserTable:
    structured = {name: column.structured for name, column in read.items() if column.structured}
    typed = {name: column for name, column in typed.items() if not pa.types.is_string(column.type)}
    return UserTable({name: column.values for name, column in read.items()}, lines, unit, structured, typed)


def _parse_csv(name: str, text: str) -> UserTable:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, lines = [], []
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise InputError(f"manifest {name}, line 1: two columns of one name in {header}")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"manifest {name}, line {reader.line_num}: {len(row)} values under {len(header)} columns"
                )
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"manifest {name}, line {reader.line_num}: {error}") from error
    values = zip(*rows, strict=True) if rows else [()] * len(header)
    columns = {key: pa.chunked_array([pa.array(column, TEXT)]) for key, column in zip(header, values, strict=True)}
    return UserTable(columns, lines, "line")


def _parse_jsonl(name: str, text: str) -> UserTable:
    columns: dict[str, list[Any]] = {}
    lines: list[int] = []
    for number, record in _json_records(name, text):
        for key, value in record.items():
            values = columns.get(key)
            if values is None:
                values = columns[key] = []
            values.extend([None] * (len(lines) - len(values)))
            values.append(value)
        lines.append(number)
    read, typed = {}, {}
    for key, values in columns.items():
        values.extend([None] * (len(lines) - len(values)))
        try:
            key.encode()
            read[key] = _json_column(values)
            typed[key] = infer_type(values, read[key].values)
        except (UnicodeEncodeError, UnreadableColumnError) as error:
            reason = "text that is not valid Unicode: " if isinstance(error, UnicodeEncodeError) else ""
            raise InputError(f"manifest {name}, column {printable(key)!r}: {reason}{error}") from error
    return _user_table(read, typed, lines, "line")


def _json_records(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        try:
            record = json.loads(line, parse_constant=JSON_CONSTANTS.get)
        except ValueError as error:
            raise InputError(f"manifest {name}, line {number}: not JSON: {error}") from error
        except RecursionError as error:
            raise InputError(f"manifest {name}, line {number}: JSON nested too deep") from error
        if not isinstance(record, dict):
            raise InputError(f"manifest {name}, line {number}: expected an object, got {type(record).__name__}")
        yield number, record


def _json_column(values: list[Any]) -> TextColumn:
    present = [value for value in values if value is not None]
    if present and all(isinstance(v, list) and all(isinstance(x, str) for x in v) for v in present):
        return TextColumn(pa.chunked_array([pa.array(values, TEXTS)]))
    texts = [value if isinstance(value, str) else json_text(value) for value in values]
    structured = tuple(row for row, value in enumerate(values) if isinstance(value, (list, dict)))
    return TextColumn(pa.chunked_array([pa.array(texts, TEXT)]), structured)


def texts_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a list column as it is; read a text column as JSON arrays of text (empty text is null).

    Raises:
        ValueError: (row, problem) of the first value that is no list of texts.
    """
    if pa.types.is_list(column.type):
        if any(chunk.flatten().null_count for chunk in column.chunks):
            bad = next(row for row, texts in enumerate(column.to_pylist()) if texts and None in texts)
            raise ValueError(bad, "a text of the list is missing")
        return column
    values: list[list[str] | None] = []
    for row, text in enumerate(column.to_pylist()):
        try:
            value = json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            raise ValueError(row, f"not a JSON array of texts: {printable(text)!r}") from error
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise ValueError(row, f"not a JSON array of texts: {printable(text)!r}")
        values.append(value)
    try:
        return pa.chunked_array([pa.array(values, TEXTS)])
    except UnicodeEncodeError as error:
        bad = next(row for row, texts in enumerate(values) if texts and _is_not_unicode("".join(texts)))
        raise ValueError(bad, "text that is not valid Unicode") from error


def _is_not_unicode(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def text_or_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a text column with empty values as null."""
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, TEXT), column)

"""Reads a user's manifest file (Parquet, JSONL, CSV) as Arrow columns with line numbers.

Columns hold text, or lists of text where the file holds lists; any other value becomes its JSON text. What the columns
mean is `build_manifest`'s to decide.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.storage.parquet import read_table

_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
_ENDINGS = (".parquet", ".jsonl", ".ndjson", ".csv")


@dataclass(frozen=True, slots=True)
class UserTable:
    """Holds the columns of a manifest file.

    Attributes:
        columns: text or list-of-text arrays of equal length.
        lines: 1-based line (row for Parquet) of each row, for messages.
        unit: ``line`` or ``row``.
    """

    columns: dict[str, pa.ChunkedArray]
    lines: Sequence[int]
    unit: str

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
    columns = {}
    for column in table.column_names:
        try:
            columns[column] = _as_text(table[column])
        except pa.ArrowException as error:
            kind = table[column].type
            raise InputError(f"manifest {name}, column {column!r}: {kind} cannot be read as text: {error}") from error
    return UserTable(columns, range(1, table.num_rows + 1), "row")


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = kind.value_type
        if pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner):
            return column.cast(_TEXTS)
    if pa.types.is_nested(kind):
        return pa.chunked_array([pa.array([_json_text(value) for value in column.to_pylist()], _TEXT)])
    return column.cast(_TEXT)


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
    columns = {key: pa.chunked_array([pa.array(column, _TEXT)]) for key, column in zip(header, values, strict=True)}
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
    arrays = {}
    for key, values in columns.items():
        values.extend([None] * (len(lines) - len(values)))
        try:
            arrays[key] = pa.chunked_array([_json_column(values)])
        except UnicodeEncodeError as error:
            raise InputError(f"manifest {name}, column {key!r}: text that is not valid Unicode: {error}") from error
    return UserTable(arrays, lines, "line")


def _json_records(name: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"manifest {name}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"manifest {name}, line {number}: expected an object, got {type(record).__name__}")
        yield number, record


def _json_column(values: list[Any]) -> pa.Array:
    present = [value for value in values if value is not None]
    if present and all(isinstance(v, list) and all(isinstance(x, str) for x in v) for v in present):
        return pa.array(values, _TEXTS)
    return pa.array([value if isinstance(value, str) else _json_text(value) for value in values], _TEXT)


def _json_text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def texts_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a list column as it is; read a text column as JSON arrays of text (empty text is null).

    Raises:
        ValueError: (row, problem) of the first value that is no JSON array of texts.
    """
    if pa.types.is_list(column.type):
        return column
    values: list[list[str] | None] = []
    for row, text in enumerate(column.to_pylist()):
        try:
            value = json.loads(text) if text else None
        except ValueError as error:
            raise ValueError(row, f"not a JSON array of texts: {text!r}") from error
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise ValueError(row, f"not a JSON array of texts: {text!r}")
        values.append(value)
    return pa.chunked_array([pa.array(values, _TEXTS)])


def text_or_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a text column with empty values as null."""
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, _TEXT), column)

"""Reads an Arrow column of any type as text, as lists of text, or refuses it: one table of types (`read_as_text`).

A missing value is null, however the file writes it: NaN is one, in a list or an object too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

TEXT, TEXTS = pa.string(), pa.list_(pa.string())
# What Python's JSON and pandas write for numbers that JSON has none of: NaN is a missing value.
JSON_CONSTANTS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}


class UnreadableColumnError(ValueError):
    """No text can be made of a column; the message says why, and what to do."""


class TextColumn(NamedTuple):
    """Holds a column as text or lists of text, and the rows whose text is the JSON of a list or an object."""

    values: pa.ChunkedArray
    structured: tuple[int, ...] = ()


def read_as_text(column: pa.ChunkedArray) -> TextColumn:
    """Return a column as text, as lists of text where it holds those, or as JSON text where it is nested otherwise.

    Raises:
        UnreadableColumnError: its type has no text.
    """
    try:
        found = _read(column)
        found.values.validate(full=True)  # Parquet promises UTF-8, and readers do not look
    except UnreadableColumnError:
        raise
    except (pa.ArrowException, ValueError, OverflowError, RecursionError) as error:
        reason = f"{column.type} cannot be read as text: {error}"
        raise UnreadableColumnError(f"{reason}; cast the column to text, or leave it out") from error
    return found


def _read(column: pa.ChunkedArray) -> TextColumn:
    kind = column.type
    for is_of, read in _TABLE:
        if is_of(kind):
            return read(column)
    raise UnreadableColumnError(f"no text can be made of {kind}; cast the column to text, or leave it out")


def with_its_type(column: pa.ChunkedArray, text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column with the type it has, where every Parquet reader knows that type; else its text.

    Args:
        column: as the file has it.
        text: as `read_as_text` reads it.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return with_its_type(column.cast(kind.value_type), text)
    if pa.types.is_float16(kind):
        return with_its_type(column.cast(pa.float32()), text)
    if pa.types.is_floating(kind):  # NaN is a missing value
        return pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
    return column if _keeps_its_type(kind) else text


def infer_type(values: list[Any], text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values of a JSON column with one type that holds them all, or their text where there is none."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds or str in kinds or (bool in kinds and len(kinds) > 1):
        return text
    try:
        column = pa.chunked_array([pa.array([_plain(value) for value in values])])
        column.validate(full=True)
    except (pa.ArrowException, ValueError, OverflowError, TypeError, RecursionError):
        return text
    return with_its_type(column, text)


def _keeps_its_type(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return _keeps_its_type(kind.value_type) or _is_a_text(kind.value_type)
    if pa.types.is_struct(kind):
        inner = [one.type for one in kind]
        return bool(inner) and all(_keeps_its_type(one) or pa.types.is_string(one) for one in inner)
    return _is_plain(kind)


def json_text(value: Any) -> str | None:
    """Return the JSON text of a value, NaN being null; None for a missing value.

    Raises:
        UnreadableColumnError: bytes are in it, or it is nested too deep.
    """
    try:
        plain = _plain(value)
        return None if plain is None else json.dumps(plain, ensure_ascii=False, default=str)
    except RecursionError as error:
        raise UnreadableColumnError("a value is nested too deep") from error


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, bytes):
        raise UnreadableColumnError("bytes within it have no text; leave the column out")
    return value


def _cast(column: pa.ChunkedArray) -> TextColumn:
    return TextColumn(column.cast(TEXT))


def _floats(column: pa.ChunkedArray) -> TextColumn:
    return TextColumn(pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column).cast(TEXT))


def _binary(column: pa.ChunkedArray) -> TextColumn:
    try:
        return TextColumn(column.cast(TEXT))
    except pa.ArrowInvalid as error:
        raise UnreadableColumnError(
            f"{column.type} whose bytes are not UTF-8 text; leave the column out, or write it as text"
        ) from error


def _dictionary(column: pa.ChunkedArray) -> TextColumn:
    return _read(column.cast(column.type.value_type))


def _run_ends(column: pa.ChunkedArray) -> TextColumn:
    return _read(pc.run_end_decode(column))


def _uuids(column: pa.ChunkedArray) -> TextColumn:
    texts = [None if value is None else str(value) for value in column.to_pylist()]
    return TextColumn(pa.chunked_array([pa.array(texts, TEXT)]))


def _stored(column: pa.ChunkedArray) -> TextColumn:
    return _read(pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type))


def _bool8(column: pa.ChunkedArray) -> TextColumn:
    return _read(pa.chunked_array([chunk.storage for chunk in column.chunks], pa.int8()).cast(pa.bool_()))


def _nested(column: pa.ChunkedArray) -> TextColumn:
    kind = column.type
    if _holds_texts(kind) and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return TextColumn(column.cast(TEXTS))
    values = column.to_pylist()
    if _holds_texts(kind):
        return TextColumn(pa.chunked_array([pa.array(values, TEXTS)]))
    texts = [json_text(value) for value in values]
    structured = tuple(row for row, text in enumerate(texts) if text is not None)
    return TextColumn(pa.chunked_array([pa.array(texts, TEXT)]), structured)


def _any_of(*names: str) -> Callable[[pa.DataType], bool]:
    tests = [getattr(pa.types, f"is_{name}") for name in names]
    return lambda kind: any(is_of(kind) for is_of in tests)


_is_a_text = _any_of("string", "large_string", "string_view")
_is_a_list = _any_of("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
_is_binary = _any_of("binary", "large_binary", "fixed_size_binary", "binary_view")
_has_a_cast = _any_of("null", "boolean", "integer", "decimal", "date", "time", "timestamp", "duration")


_is_plain = _any_of("boolean", "integer", "floating", "decimal", "date", "time", "timestamp")


def _holds_texts(kind: pa.DataType) -> bool:
    if not _is_a_list(kind):
        return False
    inner = kind.value_type.value_type if pa.types.is_dictionary(kind.value_type) else kind.value_type
    return _is_a_text(inner) or pa.types.is_null(inner)


def _is_extension(name: str) -> Callable[[pa.DataType], bool]:
    return lambda kind: getattr(kind, "extension_name", None) == name


# In this order; what nothing here is of (an interval, another extension) is refused.
_TABLE: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.ChunkedArray], TextColumn]], ...] = (
    (_is_a_text, _cast),
    (_has_a_cast, _cast),
    (pa.types.is_floating, _floats),
    (_is_binary, _binary),
    (pa.types.is_dictionary, _dictionary),
    (pa.types.is_run_end_encoded, _run_ends),
    (_is_extension("arrow.uuid"), _uuids),
    (_is_extension("arrow.json"), _stored),
    (_is_extension("arrow.bool8"), _bool8),
    (pa.types.is_nested, _nested),
)

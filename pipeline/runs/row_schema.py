"""Defines the columns of a part, in the current and in every earlier schema version.

Columns that an older part lacks are read as null. Columns are only added: in `pipeline.records.ResultRow`, and by
version in `LATER_COLUMNS` there. No column is renamed, removed or given another type.
"""

from __future__ import annotations

from dataclasses import fields

import pyarrow as pa

from pipeline.records import FIRST_SCHEMA_VERSION, LATER_COLUMNS, SCHEMA_VERSION, ResultRow

_TEXT, _SECONDS, _COUNT = pa.string(), pa.float64(), pa.int64()
_PAGE = pa.struct(  # as `pipeline.tasks.document.PageRow` has it
    [
        pa.field("page", pa.int32(), nullable=False),
        pa.field("window", pa.int32()),
        pa.field("status", _TEXT),
        pa.field("error_type", _TEXT),
        pa.field("error_message", _TEXT),
        pa.field("text", _TEXT),
        pa.field("fields", _TEXT),
        pa.field("finish_reason", _TEXT),
        pa.field("num_vision_tokens", _COUNT),
        pa.field("num_vision_tokens_kept", _COUNT),
        pa.field("num_decoder_tokens_kept", _COUNT),
        pa.field("num_generated_tokens", _COUNT),
    ]
)
_TYPES: dict[str, pa.DataType] = {
    "uris": pa.list_(_TEXT),
    "options": pa.list_(_TEXT),
    "score": pa.float64(),
    "answer_logprob": pa.float64(),
    "option_probabilities": pa.list_(pa.float64()),
    "pages": pa.list_(_PAGE),
    "fields": pa.map_(_TEXT, _TEXT),
    "attempts": pa.int32(),
    "num_frames": pa.int32(),
    "frame_timestamps_s": pa.list_(pa.float64()),
    "bytes_fetched": _COUNT,
    "kept_ratio": pa.float64(),
    "retention_ratio": pa.float64(),
    "cost_usd": pa.float64(),
    "shard_index": pa.int32(),
}
NULLABLE = frozenset(
    {
        "media_etag",
        "question_id",
        "options",
        "category",
        "answer",
        "reference",
        "score",
        "pages",
        "error_type",
        "error_message",
        "finish_reason",
        "model_revision",
        *LATER_COLUMNS,
    }
)


# In front of the names of the other columns of the user's manifest; a part has them behind its own, with their types.
USER_PREFIX = "user_"


def _type_of(name: str) -> pa.DataType:
    if name in _TYPES:
        return _TYPES[name]
    if name.startswith("num_"):
        return _COUNT
    return _SECONDS if name.endswith("_s") else _TEXT


SCHEMA = pa.schema([pa.field(f.name, _type_of(f.name), nullable=f.name in NULLABLE) for f in fields(ResultRow)])


def schema_of(version: int) -> pa.Schema:
    """Return the columns that a part of this version has."""
    columns = [column for column in SCHEMA if LATER_COLUMNS.get(column.name, FIRST_SCHEMA_VERSION) <= version]
    of_page = [one for one in _PAGE if LATER_COLUMNS.get(f"pages.{one.name}", FIRST_SCHEMA_VERSION) <= version]
    pages = pa.field("pages", pa.list_(pa.struct(of_page)))
    return pa.schema([pages if column.name == "pages" else column for column in columns])


def version_of(schema: pa.Schema) -> int | None:
    """Return the schema version of a part; None where the part does not say."""
    text = (schema.metadata or {}).get(b"illava.schema_version", b"").decode()
    return int(text) if text.isdigit() else None


def to_current_schema(table: pa.Table, names: list[str]) -> pa.Table:
    """Return the named columns of a part of any version, in this order.

    Columns that came after the part's version are null; columns that this program does not know are dropped.

    Raises:
        pa.ArrowInvalid: the part lacks a column that its version has.
    """
    version = version_of(table.schema) or SCHEMA_VERSION
    columns = []
    for column in (SCHEMA.field(name) for name in names):
        if column.name in table.column_names:
            stored = table[column.name]
            columns.append(stored if stored.type == column.type else stored.cast(column.type))
        elif LATER_COLUMNS.get(column.name, FIRST_SCHEMA_VERSION) <= version:
            raise pa.ArrowInvalid(f"no column {column.name}; it has {', '.join(table.column_names)}")
        else:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, column.type)]))
    schema = pa.schema([SCHEMA.field(name) for name in names], metadata=table.schema.metadata)
    return pa.Table.from_arrays(columns, schema=schema)

"""Blanks rows of Arrow tables, of a part and of a frozen manifest: what is personal goes, ids and counts stay.

Tables keep their columns, types, order and metadata, in whichever version they were written; other rows stay to the
bit. Pure functions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyarrow as pa

from pipeline.inputs.manifest import FIELD_PREFIX, TYPED_PREFIX
from pipeline.runs.row_schema import USER_PREFIX

ERASED_URI = "erased:"  # no address; in place of each
_KEPT_TEXTS = frozenset(
    {
        "item_id",
        "media_kind",
        "decoder",
        "finished_at",
        "model_id",
        "model_revision",
        "plan_digest",
        "recipe_digest",
        "run_fingerprint",
    }
)
_ANSWERS = frozenset({"score", "answer_logprob"})  # numbers that say something of the answer
_OF_AN_ITEM: dict[str, Any] = {"uri": ERASED_URI, "uris": [ERASED_URI], "sizes": [-1], "etags": [""]}
_IN_PARTS: dict[str, Any] = {"status": "erased"}


def erase_rows(table: pa.Table, item_ids: Collection[str]) -> tuple[pa.Table, int]:
    """Blank the rows of these items in a part; return the table, and how many rows were not blank before."""
    ids, status = table["item_id"].to_pylist(), table["status"].to_pylist()
    places = [place for place, name in enumerate(ids) if name in item_ids]
    num_new = sum(status[place] != "erased" for place in places)
    return _with_blank(table, places, _IN_PARTS), num_new


def erase_items(table: pa.Table, item_ids: Collection[str]) -> pa.Table:
    """Blank the rows of these items in a frozen manifest's table."""
    places = [place for place, name in enumerate(table["item_id"].to_pylist()) if name in item_ids]
    return _with_blank(table, places, {})


def _with_blank(table: pa.Table, places: list[int], texts: dict[str, Any]) -> pa.Table:
    if not places:
        return table
    old = table.take(pa.array(places, pa.int64())).to_pylist()
    rows = [{field.name: _blank(field, row[field.name], texts) for field in table.schema} for row in old]
    blank = pa.Table.from_pylist(rows, schema=table.schema)
    order = list(range(table.num_rows))
    for number, place in enumerate(places):
        order[place] = table.num_rows + number
    both = pa.concat_tables([table, blank])
    return both.take(pa.array(order, pa.int64())).combine_chunks().replace_schema_metadata(table.schema.metadata)


def _blank(field: pa.Field, value: Any, texts: dict[str, Any]) -> Any:
    name, kind = field.name, field.type
    if name.startswith((USER_PREFIX, FIELD_PREFIX, TYPED_PREFIX)):
        return None
    fixed = texts | _OF_AN_ITEM
    if name in fixed:
        return fixed[name]
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if name in _KEPT_TEXTS or (is_number and name not in _ANSWERS):
        return value
    if field.nullable:
        return None
    return "" if pa.types.is_string(kind) else []

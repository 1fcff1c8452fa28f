"""Publishes each shard as one Parquet object, written whole (`ParquetSink`), and reads parts of any version."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.faults import fault_point
from pipeline.records import LATER_COLUMNS, ROW_ERROR_TYPES, SCHEMA_VERSION, ResultRow, RowStatus, Shard
from pipeline.runs.row_schema import NULLABLE, SCHEMA, USER_PREFIX, to_current_schema
from pipeline.storage import storage
from pipeline.storage.parquet import read_table
from pipeline.storage.uris import printable

if TYPE_CHECKING:
    from pipeline.runs.run_folder import Run

_PART_NAME = re.compile(r"^part-(\d{5,})\.parquet$")


def part_name(shard_index: int) -> str:
    """Return a part's name, such as ``part-00042.parquet``."""
    return f"part-{shard_index:05d}.parquet"


def part_index(name: str) -> int | None:
    """Return the shard that a part's name stands for; None for any other name."""
    match = _PART_NAME.match(name)
    return int(match.group(1)) if match and part_name(int(match.group(1))) == name else None


class ParquetSink:
    """Publishes the shards of one run, each with the rows of all its items."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def open_shard(self, index: int) -> Shard:
        """Return the shard's items, all of which must be computed."""
        return self._run.shard(index)

    def count_items(self, shards: Sequence[int]) -> int:
        """Count the items to compute before these shards can be published."""
        run = self._run
        missing_in_last = run.num_shards * run.items_per_shard - len(run.manifest)
        return len(shards) * run.items_per_shard - (missing_in_last if run.num_shards - 1 in shards else 0)

    def publish(self, shard_index: int, rows: Sequence[ResultRow]) -> str:
        """Write a shard's rows as one object, in manifest order; return its URI.

        Publishing twice writes the same items under the same name.

        Args:
            shard_index: index of the shard.
            rows: rows of every item of the shard, each once, in any order.

        Raises:
            RefusedError: another run or attempt owns the folder by now.
            StorageError: rows are missing, repeated or foreign, or the write failed.
        """
        run = self._run
        expected = [item.item_id for item in run.shard(shard_index).items]
        by_id = {row.item_id: row for row in rows}
        if len(rows) != len(expected) or by_id.keys() != set(expected):
            raise StorageError(_difference(shard_index, expected, [row.item_id for row in rows]))
        ordered = [by_id[item_id] for item_id in expected]
        for row in ordered:
            self._check(row, shard_index)
        size = run.items_per_shard
        user = run.manifest.user_columns(shard_index * size, size)
        data = _part_bytes(ordered, run.part_metadata(shard_index), run.config.output.compression, user)
        run.check_ownership()
        uri = storage.join(run.uri, "data", part_name(shard_index))
        fault_point("publish_before", str(shard_index))
        storage.write_atomic(uri, data)
        fault_point("publish_after", str(shard_index))
        return uri

    def _check(self, row: ResultRow, shard_index: int) -> None:
        run, where = self._run, f"shard {shard_index}, item {printable(row.item_id)}"
        ours = (run.fingerprint, run.config_fingerprint.digest, shard_index)
        if (row.run_fingerprint, row.recipe_digest, row.shard_index) != ours:
            raise StorageError(
                f"{where}: a row of another run, config fingerprint or shard; this is a defect, report it"
            )
        is_known = row.status in get_args(RowStatus)
        if not is_known or (row.status == "failed") != (row.error_type is not None):
            raise StorageError(
                f"{where}: status {row.status!r} with error type {row.error_type!r}; failed rows name one"
            )
        if row.error_type is not None and row.error_type not in ROW_ERROR_TYPES:
            raise StorageError(f"{where}: error type {row.error_type!r} is not on the closed list (pipeline.errors)")


def read_rows(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part's rows in the current columns; a column that the part's version lacks is null.

    The part's metadata is in ``schema.metadata``.

    Raises:
        ItemError: there is no such object.
        StorageError: the object is no readable Parquet file, or lacks a column that its version has.
    """
    names = SCHEMA.names if columns is None else list(columns)
    table = read_stored(uri, names)
    try:
        return to_current_schema(table, names)
    except pa.ArrowException as error:
        raise StorageError(
            f"part {uri} cannot be read: {error}; `illava verify` says what else is damaged. Delete it, and the job's "
            "own command computes it again"
        ) from error


def read_stored(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one part as it was written; of ``columns``, those that the part has. Raises as `read_rows`."""
    data = storage.read(uri)
    try:
        table = read_table(data, columns, optional=LATER_COLUMNS.keys())
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(
            f"part {uri} cannot be read: {error}; `illava verify` says what else is damaged. Delete it, and the job's "
            "own command computes it again"
        ) from error
    return table


def result_rows(table: pa.Table) -> list[ResultRow]:
    """Return a whole part's rows as they were before they were written."""
    return [ResultRow(**{name: _plain(name, value) for name, value in row.items()}) for row in table.to_pylist()]


def _plain(name: str, value: Any) -> Any:
    if name == "fields":
        return dict(value)
    return tuple(value) if isinstance(value, list) else value


def part_attempts(run_uri: str, indexes: Sequence[int]) -> list[int]:
    """Return the attempt that wrote each of these parts; 0 where a part does not say."""
    found = (table.schema.metadata or {} for table in read_parts(run_uri, indexes, ["item_id"]))
    return [int(metadata.get(b"illava.attempt", b"0")) for metadata in found]


def list_parts(run_uri: str) -> list[int]:
    """List the indices of published shards, ascending."""
    names = storage.list_names(storage.join(run_uri, "data"))
    return sorted(index for index in map(part_index, names) if index is not None)


def read_parts(run_uri: str, indexes: Sequence[int], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read the parts' rows in the order of ``indexes``, eight parts at a time."""
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(indexes), 64):
            uris = [storage.join(run_uri, "data", part_name(i)) for i in indexes[start : start + 64]]
            yield from pool.map(lambda uri: read_rows(uri, columns), uris)


def _part_bytes(
    rows: Sequence[ResultRow],
    metadata: dict[str, str],
    compression: str,
    user: Mapping[str, pa.ChunkedArray] | None = None,
) -> bytes:
    schema = SCHEMA.with_metadata({"illava.schema_version": str(SCHEMA_VERSION), **metadata})
    columns = []
    for field in SCHEMA:
        values = [getattr(row, field.name) for row in rows]
        if field.name == "fields":
            values = [sorted(value.items()) for value in values]
        elif field.name == "error_message":
            values = [None if value is None else printable(value, 2000) for value in values]
        columns.append(_column(field, values))
    table = pa.Table.from_arrays(columns, schema=schema)
    for name, column in (user or {}).items():
        table = table.append_column(f"{USER_PREFIX}{name}", column)
    return table_bytes(table, compression)


def table_bytes(table: pa.Table, compression: str) -> bytes:
    """Write a part's table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression, write_page_checksum=True)
    return sink.getvalue()


def _column(field: pa.Field, values: list) -> pa.Array:
    if not field.nullable and any(value is None for value in values):
        raise StorageError(f"column {field.name}: a row without a value; only {sorted(NULLABLE)} may be empty")
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, UnicodeEncodeError, TypeError) as error:
        raise StorageError(f"column {field.name}: a value that does not fit {field.type}: {error}") from error


def _difference(shard_index: int, expected: list[str], got: list[str]) -> str:
    missing = sorted(set(expected) - set(got))[:3]
    foreign = sorted(set(got) - set(expected))[:3]
    doubled = sorted({item_id for item_id in got if got.count(item_id) > 1})[:3]
    return (
        f"shard {shard_index} needs {len(expected)} rows and was given {len(got)}; "
        f"missing {missing}, foreign {foreign}, doubled {doubled}; nothing was written"
    )

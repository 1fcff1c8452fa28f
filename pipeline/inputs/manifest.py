"""Holds the frozen manifest: every item of a run in order, in columns, with a digest of the content.

The manifest is an Arrow table, so that 10^7 items take no Python object each until their shard is opened.
`pipeline.inputs.build_manifest` makes manifests.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.inputs.input_counts import InputCounts
from pipeline.records import MediaItem
from pipeline.storage.parquet import read_table

# Metadata of a frozen manifest of which items were erased: the digest that it was frozen with, and the present one.
_ERASED_FROM, _ERASED_DIGEST = "illava.erased_from", "illava.erased_digest"
FIELD_PREFIX, TYPED_PREFIX = "field:", "typed:"
_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
_NEEDED = (
    "item_id",
    "uris",
    "media_kind",
    "sizes",
    "etags",
)  # the other columns are null where a frozen manifest lacks them
COLUMNS = {
    "item_id": _TEXT,
    "uris": _TEXTS,
    "media_kind": _TEXT,
    "sizes": pa.list_(pa.int64()),
    "etags": _TEXTS,
    "prompt": _TEXT,
    "question_id": _TEXT,
    "options": _TEXTS,
    "reference": _TEXT,
    "category": _TEXT,
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """Holds items in their final order.

    Attributes:
        table: `COLUMNS`, then one text column ``field:NAME`` for every other column of the user's manifest, and one
            ``typed:NAME`` beside it where its own type is another; the digest leaves the latter out.
        digest: digest of the content; independent of file format, compression and library versions. The digest of a
            manifest that an earlier version froze covers the columns of that version.
        counts: what the input held when it was frozen; of an earlier version's manifest, what that version counted.
        digested: columns that ``digest`` covers; None stands for all.
        first_extensions: whether it was listed before `pipeline.inputs.columns` had its later extensions.
        keeps_types: whether it was frozen with the users' types; rows of one that was not have no columns for them.
        is_erased: whether items were blanked since it was frozen; ``digest`` stays that of the frozen content.
    """

    table: pa.Table
    digest: str
    counts: InputCounts | None = None
    digested: tuple[str, ...] | None = None
    first_extensions: bool = False
    keeps_types: bool = True
    is_erased: bool = False

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def items(self) -> tuple[MediaItem, ...]:
        """All items as records, for small manifests and tests."""
        return self.slice(0, len(self))

    @property
    def left_out(self) -> Mapping[str, int]:
        """Listed objects that are no items since their extension names no known medium, by extension."""
        return self.counts.left_out if self.counts else {}

    @property
    def num_done(self) -> int:
        """Items that were left out because ``exclude_runs`` holds them."""
        return self.counts.num_done + self.counts.num_failing if self.counts else 0

    @property
    def num_unsized(self) -> int:
        """Objects whose size is not known."""
        return sum(int((chunk.flatten().to_numpy() < 0).sum()) for chunk in self.table["sizes"].chunks)

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects whose size is known."""
        return sum(int(np.maximum(chunk.flatten().to_numpy(), 0).sum()) for chunk in self.table["sizes"].chunks)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of media among the items."""
        return frozenset(pc.unique(self.table["media_kind"]).to_pylist())

    def num_stored(self, *, above: int, most: int) -> int:
        """Count objects in a store with more than ``above`` and at most ``most`` bytes, where the size is known."""
        count = 0
        for chunk in self.table.select(["uris", "sizes"]).to_batches():
            uris, sizes = (column.flatten() for column in chunk.columns)
            in_range = pc.and_(pc.greater(sizes, above), pc.less_equal(sizes, most))
            stored = pc.or_(pc.starts_with(uris, "s3://"), pc.starts_with(uris, "gs://"))
            count += pc.sum(pc.and_(in_range, stored)).as_py() or 0
        return count

    def slice(self, start: int, count: int) -> tuple[MediaItem, ...]:
        """Return the items ``start`` .. ``start + count - 1``."""
        return tuple(_item(row) for row in self.table.slice(start, count).to_pylist())

    def user_columns(self, start: int, count: int) -> dict[str, pa.ChunkedArray]:
        """Return the other columns of the user's manifest with their own types, for some of the items."""
        if not self.keeps_types:
            return {}
        some, have = self.table.slice(start, count), set(self.table.column_names)
        names = [name.removeprefix(FIELD_PREFIX) for name in self.table.column_names if name.startswith(FIELD_PREFIX)]
        return {
            name: some[f"{TYPED_PREFIX}{name}" if f"{TYPED_PREFIX}{name}" in have else f"{FIELD_PREFIX}{name}"]
            for name in names
        }

    def holds(self, other: Manifest) -> bool:
        """Whether another manifest has the same items, compared over this one's columns; fields must all be known."""
        if self.digest == other.digest:
            return True
        names = list(self.digested or self.table.column_names)
        unknown = {name for name in other.table.column_names if name.startswith(FIELD_PREFIX)} - set(names)
        if unknown or not set(names) <= set(other.table.column_names):
            return False
        return _content_digest(other.table.select(names)) == self.digest

    def without(self, extensions: Sequence[str]) -> Manifest:
        """Return a manifest without the items whose first address ends so, with a digest of its own."""
        first = pc.list_element(self.table["uris"], 0)
        pattern = rf"(?i)\.(?:{'|'.join(extensions)})$"
        table = self.table.filter(pc.invert(pc.match_substring_regex(first, pattern))).combine_chunks()
        return Manifest(table, _content_digest(table))

    def take(self, places: Sequence[int]) -> Manifest:
        """Return a manifest of the items at these places, with a digest of its own."""
        table = self.table.take(pa.array(places, pa.int64())).combine_chunks()
        return Manifest(table, _content_digest(table))

    def item_ids(self) -> list[str]:
        """Return every item's id, in order."""
        return self.table["item_id"].to_pylist()


def freeze(columns: dict[str, Any], *, counts: InputCounts | None = None) -> Manifest:
    """Make a manifest of Arrow columns; missing optional columns become null, field columns are ordered by name."""
    num_rows = len(columns["item_id"])
    names = [*COLUMNS, *sorted(name for name in columns if name.startswith((FIELD_PREFIX, TYPED_PREFIX)))]
    types = {name: columns[name].type if name.startswith(TYPED_PREFIX) else COLUMNS.get(name, _TEXT) for name in names}
    arrays = [columns.get(name, pa.nulls(num_rows, kind)) for name, kind in types.items()]
    table = pa.table(arrays, schema=pa.schema(list(types.items())))
    return Manifest(table, _content_digest(table), counts)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Write a manifest as one Parquet file, which `read_manifest` reads."""
    sink = io.BytesIO()
    metadata = {"illava.left_out": json.dumps(dict(manifest.left_out)), "illava.num_done": str(manifest.num_done)}
    if manifest.is_erased:
        metadata |= {_ERASED_FROM: manifest.digest, _ERASED_DIGEST: _content_digest(manifest.table)}
        if manifest.first_extensions:
            del metadata["illava.left_out"]
    if manifest.keeps_types:
        metadata["illava.keeps_types"] = "1"
    if manifest.counts:
        metadata["illava.counts"] = json.dumps(manifest.counts.as_dict())
    pq.write_table(manifest.table.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue()


def read_manifest(data: bytes) -> Manifest:
    """Read a frozen manifest from its Parquet file, and compute its digest again.

    Raises:
        InputError: the file is no frozen manifest.
    """
    try:
        table = read_table(data)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"the frozen manifest cannot be read: {error}") from error
    have = set(table.column_names)
    missing = [
        name for name, kind in COLUMNS.items() if (table[name].type != kind if name in have else name in _NEEDED)
    ]
    if missing:
        raise InputError(f"not a frozen manifest: columns {missing} are missing or of another type")
    counts = table.schema.metadata or {}
    table = table.replace_schema_metadata(None)
    digest, digested = _content_digest(table), tuple(table.column_names)
    is_erased = _ERASED_FROM.encode() in counts
    if is_erased and digest == counts.get(_ERASED_DIGEST.encode(), b"").decode():
        digest = counts[_ERASED_FROM.encode()].decode()  # an altered one keeps its own, which is refused
    for name in COLUMNS.keys() - have:
        table = table.append_column(name, pa.nulls(table.num_rows, COLUMNS[name]))
    return Manifest(
        table,
        digest,
        _recorded_counts(counts, table.num_rows),
        digested,
        b"illava.left_out" not in counts,
        b"illava.keeps_types" in counts,
        is_erased,
    )


def _recorded_counts(metadata: Mapping[bytes, bytes], num_items: int) -> InputCounts:
    """Return a frozen manifest's counts; of those of an earlier version, the sum over what it counted."""
    if b"illava.counts" in metadata:
        return InputCounts(**json.loads(metadata[b"illava.counts"]))
    left_out, num_done = json.loads(metadata.get(b"illava.left_out", b"{}")), int(metadata.get(b"illava.num_done", 0))
    return InputCounts(num_items + num_done + sum(left_out.values()), num_items, num_done, left_out=left_out)


def _item(row: dict[str, Any]) -> MediaItem:
    prefix = len(FIELD_PREFIX)
    return MediaItem(
        item_id=row["item_id"],
        uris=tuple(row["uris"]),
        media_kind=row["media_kind"],
        sizes=tuple(row["sizes"]),
        etags=tuple(row["etags"]),
        prompt=row["prompt"],
        question_id=row["question_id"],
        options=None if row["options"] is None else tuple(row["options"]),
        reference=row["reference"],
        category=row["category"],
        fields={n[prefix:]: v for n, v in row.items() if n.startswith(FIELD_PREFIX) and v is not None},
    )


def _content_digest(table: pa.Table) -> str:
    """Return 32 hex digits over names, lengths and values; independent of how the columns are chunked or stored."""
    digest = hashlib.sha256(str(table.num_rows).encode())
    for name in table.column_names:
        if name.startswith(TYPED_PREFIX):
            continue  # its text is digested
        digest.update(f"\n{name}\n".encode())
        _add_column(digest, table[name].chunks)
    return digest.hexdigest()[:32]


def _add_column(digest: Any, chunks: list[pa.Array]) -> None:
    if not chunks:
        return
    kind = chunks[0].type
    if pa.types.is_list(kind):
        for chunk in chunks:
            digest.update(pc.fill_null(pc.list_value_length(chunk), -1).to_numpy().astype("<i4").tobytes())
        _add_column(digest, [chunk.flatten() for chunk in chunks])
    elif pa.types.is_string(kind):
        for chunk in chunks:
            digest.update(pc.fill_null(pc.binary_length(chunk), -1).to_numpy().astype("<i4").tobytes())
        for chunk in chunks:
            digest.update(_text_bytes(pc.fill_null(chunk, "")))
    else:
        for chunk in chunks:
            digest.update(chunk.to_numpy().astype("<i8").tobytes())


def _text_bytes(chunk: pa.Array) -> memoryview | bytes:
    """Return the values of a text array without nulls, end to end, without a copy."""
    _, offsets, values = chunk.buffers()
    if values is None or len(chunk) == 0:
        return b""
    bounds = np.frombuffer(offsets, np.int32, len(chunk) + 1, chunk.offset * 4)
    return memoryview(values)[bounds[0] : bounds[-1]]

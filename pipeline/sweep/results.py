"""Keeps the results of a sweep in one Parquet of one row a point.

It is written whole after every point, so that a sweep goes on where it was stopped.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RefusedError
from pipeline.storage import storage
from pipeline.storage.parquet import read_table
from pipeline.sweep.point_record import PointRecord

FILE = "sweep.parquet"
Key = tuple[str, str, str]  # table, row, model
COMPONENTS = ("vision_s", "prefill_s", "decode_s")


@dataclass(frozen=True, slots=True)
class SweepRow:
    """Holds one point; field names and order are the schema.

    Attributes:
        table, row, model: the point's names.
        axes: values of its axes, as text.
        plan: as JSON. kinds: the reducers' kinds in order. digest: of everything the figures depend on.
        depends_on: that itself, as JSON (`pipeline.sweep.point_record`); null in rows of the first sweeps.
        num_items: loaded and asked. num_not_loaded: left out of every point alike. num_failed: of the asked ones.
        num_patches, num_vision_tokens: mean an item, as the unreduced model has them.
        num_vision_tokens_kept, num_decoder_tokens_kept: mean an item into the LLM and in its last layer, measured.
        kept_ratio: the last layer's share of the unreduced model's visual tokens.
        accuracy, accuracy_low, accuracy_high: mean score with its 95 % interval over media; null without references;
            an item that fails scores 0.
        difference, difference_low, difference_high: to the unreduced model on the same items, paired.
        agreement_top1, agreement_kl_nats: see `illava.analysis.agreement`; mean over items.
        agreement_top1_low, agreement_top1_high: its 95 % interval over media; null in rows of earlier sweeps.
        items_per_s: all items in one running batch.
        peak_memory_bytes: during that batch; allocated on a GPU, resident on a CPU.
        vision_s, prefill_s, decode_s: one request alone; medians over rounds, mean over items.
        whole_vision_s, whole_prefill_s, whole_decode_s: the unreduced model's, taken in turn with them.
        request_s_low, request_s_high: of one request alone, the fastest and the slowest round, mean over items; null in
            rows of earlier sweeps.
        scores: of every scored item, in manifest order.
    """

    table: str
    row: str
    model: str
    axes: dict[str, str]
    plan: str
    kinds: list[str]
    digest: str
    num_items: int
    num_not_loaded: int
    num_failed: int
    num_patches: float | None = None
    num_vision_tokens: float | None = None
    num_vision_tokens_kept: float | None = None
    num_decoder_tokens_kept: float | None = None
    kept_ratio: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    agreement_top1: float | None = None
    agreement_kl_nats: float | None = None
    items_per_s: float | None = None
    peak_memory_bytes: int | None = None
    vision_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    whole_vision_s: float | None = None
    whole_prefill_s: float | None = None
    whole_decode_s: float | None = None
    scores: list[float] | None = None
    depends_on: str | None = None
    agreement_top1_low: float | None = None
    agreement_top1_high: float | None = None
    request_s_low: float | None = None
    request_s_high: float | None = None

    @property
    def quality(self) -> float | None:
        """Accuracy where there are references, else top-1 agreement with the unreduced model."""
        return self.agreement_top1 if self.accuracy is None else self.accuracy

    @property
    def kept_percent(self) -> float | None:
        """`kept_ratio` in per cent."""
        return None if self.kept_ratio is None else 100 * self.kept_ratio

    @property
    def s_per_item(self) -> float | None:
        """Seconds an item, in the batch."""
        return 1 / self.items_per_s if self.items_per_s else None

    @property
    def peak_memory_mib(self) -> float | None:
        """`peak_memory_bytes` in MiB."""
        return None if self.peak_memory_bytes is None else self.peak_memory_bytes / 2**20

    @property
    def key(self) -> Key:
        return self.table, self.row, self.model


_TYPES: dict[str, pa.DataType] = {
    "str": pa.string(),
    "str | None": pa.string(),
    "int": pa.int64(),
    "int | None": pa.int64(),
    "float | None": pa.float64(),
    "list[str]": pa.list_(pa.string()),
    "list[float] | None": pa.list_(pa.float64()),
    "dict[str, str]": pa.map_(pa.string(), pa.string()),
}
# Null in the rows of sweeps that lack them.
_LATER_COLUMNS = frozenset(
    {"depends_on", "agreement_top1_low", "agreement_top1_high", "request_s_low", "request_s_high"}
)
SCHEMA = pa.schema([(field.name, _TYPES[str(field.type)]) for field in fields(SweepRow)])


def read_results(uri: str) -> list[SweepRow]:
    """Read what a sweep's folder holds; nothing where it is new.

    Raises:
        RefusedError: the file is damaged, or has other columns.
    """
    path = f"{uri.rstrip('/')}/{FILE}"
    if not storage.exists(path):
        return []
    try:
        table = read_table(storage.read(path))
    except (pa.ArrowException, OSError) as error:
        raise RefusedError(
            f"{path} is no readable Parquet file ({error}): move it away, or name another output.uri"
        ) from error
    if not {*SCHEMA.names} ^ {*table.schema.names} <= _LATER_COLUMNS:
        raise RefusedError(f"{path} has other columns than this version writes; name another output.uri")
    return [SweepRow(**{**line, "axes": dict(line["axes"])}) for line in table.to_pylist()]


def take_over(found: Sequence[SweepRow], records: Mapping[Key, PointRecord], uri: str) -> list[SweepRow]:
    """Return the rows that a folder holds, each with what it depends on.

    Raises:
        RefusedError: a row that this sweep has not, or that was measured otherwise (names what differs).
    """
    for row in found:
        if why := _why_foreign(row, records.get(row.key)):
            raise RefusedError(
                f"{uri} holds {row.table} / {row.row} ({row.model}), which {why}: name another output.uri, or remove it"
            )
    return [row if row.depends_on else replace(row, depends_on=records[row.key].text) for row in found]


def _why_foreign(row: SweepRow, record: PointRecord | None) -> str | None:
    if record is None:
        return "is not in this configuration"
    if row.digest == record.digest:
        return None
    if row.depends_on is None:
        return "was measured under other settings (items, model, plan, task, speed or versions)"
    differs = record.difference(json.loads(row.depends_on))
    shown = "; ".join(
        f"{key}: {json.dumps(there)} there, {json.dumps(here)} here" for key, (there, here) in differs.items()
    )
    return f"was measured under other settings ({shown})" if differs else None


def write_results(uri: str, rows: Sequence[SweepRow]) -> None:
    """Write all rows, whole or not at all."""
    columns: dict[str, Any] = {name: [asdict(row)[name] for row in rows] for name in SCHEMA.names}
    columns["axes"] = [list(axes.items()) for axes in columns["axes"]]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), buffer)
    storage.write_atomic(f"{uri.rstrip('/')}/{FILE}", buffer.getvalue())

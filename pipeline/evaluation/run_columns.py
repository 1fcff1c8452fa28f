"""Reads columns of a finished run, in manifest order, for what is computed over whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RefusedError
from pipeline.runs.parquet_sink import read_parts
from pipeline.runs.run_folder import is_finished
from pipeline.runs.run_record import read_run_file
from pipeline.storage import storage


@dataclass(frozen=True, slots=True)
class RunColumns:
    """Holds a finished run's rows by column.

    Attributes:
        uri: of the run.
        record: its ``run.json``.
        columns: name -> one value a row.
    """

    uri: str
    record: dict[str, Any]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    @property
    def media(self) -> list[str]:
        """What each row's questions are clustered by: its media's addresses."""
        return ["\n".join(uris) for uris in self.columns["uris"]]


def categories_of(run: RunColumns) -> list[str]:
    """Name each row's category, behind its benchmark where the run has several; "" where it has none."""
    benchmarks = [fields.get("benchmark", "") for fields in run.columns["fields"]]
    several = len(set(benchmarks)) > 1
    return [
        " / ".join(part for part in (benchmark if several else "", category or "") if part)
        for benchmark, category in zip(benchmarks, run.columns["category"], strict=True)
    ]


def read_run_columns(uri: str, names: Sequence[str]) -> RunColumns:
    """Read these columns of all rows.

    Raises:
        RefusedError: no run, or one that is not finished.
    """
    uri = storage.folder_uri(uri)
    record = read_run_file(uri)
    if not is_finished(uri):
        raise RefusedError(f"{uri} is not finished (no _RUN.json); run its command again to finish it")
    columns: dict[str, list[Any]] = {name: [] for name in names}
    num_shards = -(-record["num_items"] // record["items_per_shard"])
    for table in read_parts(uri, range(num_shards), list(names)):
        for name in names:
            values = table[name].to_pylist()
            columns[name] += [dict(value) for value in values] if name == "fields" else values
    return RunColumns(uri, record, columns)

"""Converts a benchmark's published files to a manifest on disk: reads rows, writes embedded images, finds the videos.

`pipeline.evaluation.benchmarks.registry` says what rows mean.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.evaluation.benchmarks.registry import ConvertedItem, benchmark, convert_rows, group_by_medium
from pipeline.inputs.arrow_text import JSON_CONSTANTS
from pipeline.storage import storage
from pipeline.storage.parquet import read_table

_ENDINGS = (".parquet", ".jsonl", ".json", ".tsv", ".csv")


@dataclass(frozen=True, slots=True)
class WrittenManifest:
    """Describes what `write_manifest` made.

    Attributes:
        uri: of the manifest; give it as ``input.manifest``.
        num_items: lines.
        num_media: different media they are about.
        num_images: images written below the media's prefix.
    """

    uri: str
    num_items: int
    num_media: int
    num_images: int


def write_manifest(
    name: str, source_uri: str, *, media_uri: str, manifest_uri: str, subtitles_uri: str | None = None
) -> WrittenManifest:
    """Write a benchmark's manifest (JSONL), all questions of a medium together.

    Images that the rows carry are written below ``media_uri``, named by their content; videos and images that rows
    name are looked up there, by their names without extension.

    Args:
        name: of the benchmark, see `pipeline.evaluation.benchmarks.registry.BENCHMARKS`.
        source_uri: a published file, or a prefix with several (Parquet, JSONL, JSON, TSV, CSV).
        media_uri: prefix of the media; give it as ``input.uri``.
        manifest_uri: where the manifest goes; its name ends in ``.jsonl``.
        subtitles_uri: prefix with ``NAME.srt`` for a benchmark that asks with subtitles.

    Raises:
        InputError: unknown benchmark, rows that cannot be read, or media that are not there.
    """
    table = benchmark(name)
    if not manifest_uri.endswith(".jsonl"):
        raise InputError(f"manifest {manifest_uri}: its name must end in .jsonl")
    rows = read_rows(source_uri)
    if subtitles_uri is not None:
        rows = _with_subtitles(rows, subtitles_uri, table.media)
    written: set[str] = set()
    items = []
    for item in convert_rows(name, rows):
        for file, data in item.embedded.items():
            if file not in written:
                storage.write_atomic(storage.join(media_uri, file), data)
                written.add(file)
        items.append(ConvertedItem(item.columns))
    if not items:
        raise InputError(f"{source_uri} has no rows of benchmark {name}; expected: {table.dataset}")
    lines = [
        json.dumps(item.columns, ensure_ascii=False) for item in _found(group_by_medium(items), media_uri, written)
    ]
    storage.write_atomic(manifest_uri, ("\n".join(lines) + "\n").encode())
    media = {tuple(item.columns["uris"]) for item in items}
    return WrittenManifest(manifest_uri, len(items), len(media), len(written))


def read_rows(uri: str) -> Iterator[dict[str, Any]]:
    """Rows of one file, or of all files below a prefix in the order of their names.

    Raises:
        InputError: no file of a known kind, or one that cannot be read.
    """
    uris = [uri] if uri.endswith(_ENDINGS) else [found.uri for found in storage.list_objects(uri, "**/*")]
    uris = sorted(found for found in uris if found.endswith(_ENDINGS))
    if not uris:
        raise InputError(f"{uri}: no file that ends in {', '.join(_ENDINGS)}")
    for found in uris:
        try:
            yield from _read_file(found, storage.read(found))
        except (ValueError, csv.Error, pa.ArrowException, OSError, RecursionError) as error:
            raise InputError(f"{found} cannot be read: {error}") from error


def _read_file(uri: str, data: bytes) -> Iterator[dict[str, Any]]:
    if uri.endswith(".parquet"):
        for batch in read_table(data).to_batches(max_chunksize=64):
            yield from batch.to_pylist()
        return
    text = data.decode("utf-8-sig")
    if uri.endswith(".jsonl"):
        yield from (json.loads(line, parse_constant=JSON_CONSTANTS.get) for line in text.split("\n") if line.strip())
    elif uri.endswith(".json"):
        rows = json.loads(text, parse_constant=JSON_CONSTANTS.get)
        # MM-Vet's own file is an object of id -> row.
        yield from ({"question_id": key, **row} for key, row in rows.items()) if isinstance(rows, dict) else rows
    else:
        csv.field_size_limit(sys.maxsize)  # images as base64 are longer than the default
        dialect = "excel-tab" if uri.endswith(".tsv") else "excel"
        yield from csv.DictReader(io.StringIO(text, newline=""), dialect=dialect)


def _with_subtitles(rows: Iterator[dict[str, Any]], prefix: str, media: Any) -> Iterator[dict[str, Any]]:
    """Rows with a column ``subtitle``; empty where a video has no file."""
    found = storage.list_objects(prefix, "**/*.srt")
    files = {os.path.splitext(os.path.basename(info.uri))[0]: info.uri for info in found}
    if not files:
        raise InputError(f"subtitles {prefix}: no .srt file")
    texts: dict[str, str] = {}
    for row in rows:
        name = str(media(row)[0])
        if name not in texts:
            uri = files.get(name)
            try:
                texts[name] = storage.read(uri).decode("utf-8-sig") if uri else ""
            except UnicodeDecodeError as error:
                raise InputError(f"{uri} is not UTF-8 ({error}); save it as UTF-8") from error
        yield {**row, "subtitle": texts[name]}


def _found(items: list[ConvertedItem], media_uri: str, written: set[str]) -> list[ConvertedItem]:
    """The items with the names that their media have below the prefix."""
    if all(name in written for item in items for name in item.columns["uris"]):
        return items
    prefix = media_uri.rstrip("/") + "/"
    below = [found.uri.removeprefix(prefix) for found in storage.list_objects(media_uri)]
    names = {name: name for name in below} | {os.path.splitext(name)[0]: name for name in below}
    names |= {os.path.basename(stem): name for stem, name in list(names.items())}
    wanted = sorted({name for item in items for name in item.columns["uris"]})
    places = {name: names.get(name) or names.get(os.path.splitext(name)[0]) for name in wanted}
    if missing := [name for name, place in places.items() if place is None]:
        raise InputError(
            f"{len(missing)} of {len(wanted)} media are not below {media_uri}, the first is {missing[0]!r}; copy the "
            "benchmark's media there first"
        )
    return [ConvertedItem({**item.columns, "uris": [places[name] for name in item.columns["uris"]]}) for item in items]

"""Converts rows of a benchmark in its published columns to rows of a manifest. Reads no files.

What is particular to a benchmark stands in one row of a table (`pipeline.evaluation.benchmarks.image`,
`pipeline.evaluation.benchmarks.video`); what is common to all stands here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import InputError
from pipeline.evaluation.benchmarks.base import Benchmark, Row
from pipeline.evaluation.benchmarks.image import IMAGE_BENCHMARKS
from pipeline.evaluation.benchmarks.video import VIDEO_BENCHMARKS

BENCHMARKS: dict[str, Benchmark] = {table.name: table for table in (*IMAGE_BENCHMARKS, *VIDEO_BENCHMARKS)}

_EXTENSIONS = ((b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"BM", ".bmp"), (b"GIF8", ".gif"))
_MIN_BASE64 = 256  # a shorter text in an image column is a file's name


@dataclass(frozen=True, slots=True)
class ConvertedItem:
    """Holds one line of a manifest.

    Attributes:
        columns: of the manifest; ``uris`` are names relative to the folder of the media.
        embedded: bytes of the images that the published row carried, by the same names.
    """

    columns: dict[str, Any]
    embedded: dict[str, bytes] = field(default_factory=dict)


def benchmark(name: str) -> Benchmark:
    """Find the table's row of this name.

    Raises:
        InputError: there is none; names all.
    """
    if name not in BENCHMARKS:
        raise InputError(f"no converter for benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def render_list() -> str:
    """List the benchmarks: name, what its items are, how its number is made, whose columns are read, and notes."""
    width = max(map(len, BENCHMARKS)) + 2
    lines = [f"{'name':<{width}}{'media':<8}{'number':<15}published files"]
    for table in BENCHMARKS.values():
        lines.append(f"{table.name:<{width}}{table.media_kind:<8}{table.aggregate:<15}{table.dataset}")
        lines += [f"{'':<{width}}{table.note}"] * bool(table.note)
    return "\n".join(lines)


def next_command(name: str, *, media_uri: str, manifest_uri: str) -> str:
    """Say the command that answers the converted questions; its output is a folder of this machine."""
    table = benchmark(name)
    keys = {
        "input.uri": media_uri,
        "input.manifest": manifest_uri,
        "sampling.max_new_tokens": str(table.max_new_tokens),
        "output.uri": f"runs/{name}",
    }
    if table.media_kind != "video":
        keys["reduction.preset"] = "ward-image-50"
    overrides = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    return shlex.join(["illava", "answer", "--config", "configs/answer_questions.yaml", *overrides])


def convert_rows(name: str, rows: Iterable[Row]) -> Iterator[ConvertedItem]:
    """Manifest lines of a benchmark's rows, in their order; rows of another part of the benchmark are left out.

    ``item_id`` is the benchmark's name and the row's place in the file. Columns that exporting to a judge or an
    official score needs travel along as ``source_NAME``.

    Args:
        name: of the benchmark, see `BENCHMARKS`.
        rows: as published. Images are ``{"bytes": ..., "path": ...}``, base64 texts or names of files.

    Raises:
        InputError: a row without a column the benchmark needs, or with a value that cannot be read; with its place.
    """
    table = benchmark(name)
    for place, row in enumerate(rows):
        try:
            if table.keep_row(row):
                yield _item(table, row, place)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            problem = f"no column {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"benchmark {name}, row {place}: {problem}; columns are {', '.join(row)}. Expected: {table.dataset}"
            ) from error


def group_by_medium(items: Iterable[ConvertedItem]) -> list[ConvertedItem]:
    """Put all questions about one image or video together, media and questions in the order they first came.

    A run takes items in manifest order: neighbours on one medium can share what was loaded and encoded.
    """
    groups: dict[tuple[str, ...], list[ConvertedItem]] = {}
    for item in items:
        groups.setdefault(tuple(item.columns["uris"]), []).append(item)
    return [item for group in groups.values() for item in group]


def _item(table: Benchmark, row: Row, place: int) -> ConvertedItem:
    names, embedded = [], {}
    for cell in table.media(row):
        name, data = _medium(cell)
        names.append(name)
        if data is not None:
            embedded[name] = data
    if not names:
        raise ValueError("no medium")
    reference = table.reference(row)
    columns: dict[str, Any] = {
        "item_id": f"{table.name}-{place:06d}",
        "uris": names,
        "media_kind": table.media_kind,
        "question_id": str(table.question_id(row, place)),
        "prompt": table.prompt(row),
        "metric": table.metric(row),
        "benchmark": table.name,
    }
    optional = {"reference": _reference_text(reference), "options": table.options(row), "category": table.category(row)}
    columns |= {name: value for name, value in optional.items() if value not in (None, "", [])}
    columns |= {f"source_{name}": _text(row[name]) for name in table.keep if row.get(name) is not None}
    return ConvertedItem(columns, embedded)


def _medium(cell: Any) -> tuple[str, bytes | None]:
    """The name of a medium, and its bytes where the row carries them; equal bytes get equal names."""
    if isinstance(cell, dict):
        data, path = cell.get("bytes"), cell.get("path")
    elif isinstance(cell, str) and len(cell) >= _MIN_BASE64:
        data, path = base64.b64decode(cell, validate=True), None
    else:
        data, path = None, cell
    if data is None:
        if not path or not isinstance(path, str):
            raise ValueError(f"a medium without bytes and without a name: {str(cell)[:80]!r}")
        return path, None
    return f"{hashlib.sha256(data).hexdigest()[:24]}{_extension(data)}", data


def _extension(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    for magic, extension in _EXTENSIONS:
        if data.startswith(magic):
            return extension
    raise ValueError(f"an image of unknown format, it begins with {binascii.hexlify(data[:8]).decode()}")


def _reference_text(reference: str | list[str] | None) -> str | None:
    """One accepted answer as it is, several as a JSON array (see `pipeline.tasks.answers.references_of`)."""
    return json.dumps(reference, ensure_ascii=False) if isinstance(reference, list) else reference


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

"""Tests that whatever a manifest holds, it is read or refused in words: every type, every column, every format."""

import csv
import datetime
import decimal
import io
import itertools
import json
import os
import uuid

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import CaptionConfig, QuestionConfig
from pipeline.exit_codes import guarded
from pipeline.inputs.arrow_text import UnreadableColumnError, read_as_text
from pipeline.inputs.build_manifest import build_manifest
from pipeline.inputs.column_names import KNOWN_COLUMNS
from pipeline.inputs.manifest import manifest_bytes, read_manifest

UUID = uuid.UUID(int=3)
NOT_UTF8 = b"\xff\xfe"


def _stored(kind, values, storage):
    return pa.ExtensionArray.from_storage(kind, pa.array(values, storage))


def _text_that_is_not_utf8():
    offsets = pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0]))
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(NOT_UTF8)])


# Name -> an array, and what it is read as; None where its column is refused.
ARROW = {
    "text": (pa.array(["a"]), ["a"]),
    "large text": (pa.array(["a"], pa.large_string()), ["a"]),
    "text view": (pa.array(["a"], pa.string_view()), ["a"]),
    "dictionary": (pa.array(["a", None]).dictionary_encode(), ["a", None]),
    "dictionary of numbers": (pa.array([7]).dictionary_encode(), ["7"]),
    "run ends": (pc.run_end_encode(pa.array(["a", "a"])), ["a", "a"]),
    "nulls": (pa.nulls(1), [None]),
    "bool": (pa.array([True]), ["true"]),
    "bool8": (_stored(pa.bool8(), [1], pa.int8()), ["true"]),
    "int": (pa.array([-7], pa.int8()), ["-7"]),
    "float": (pa.array([1.5, float("nan"), None]), ["1.5", None, None]),
    "half": (pa.array([float("nan")], pa.float16()), [None]),
    "decimal": (pa.array([decimal.Decimal("1.20")]), ["1.20"]),
    "date": (pa.array([datetime.date(2026, 1, 2)]), ["2026-01-02"]),
    "time": (pa.array([datetime.time(1, 2)], pa.time32("s")), ["01:02:00"]),
    "timestamp": (pa.array([datetime.datetime(2026, 1, 2)], pa.timestamp("s")), ["2026-01-02 00:00:00"]),
    "timestamp nowhere": (pa.array([0], pa.timestamp("s", "No/Where")), None),
    "duration": (pa.array([5], pa.duration("s")), ["5"]),
    "interval": (pa.array([pa.MonthDayNano([1, 2, 3])]), None),
    "uuid": (_stored(pa.uuid(), [UUID.bytes], pa.binary(16)), [str(UUID)]),
    "json": (_stored(pa.json_(), ["[1]"], pa.string()), ["[1]"]),
    "another extension": (_stored(pa.opaque(pa.int8(), "t", "v"), [1], pa.int8()), None),
    "binary that is text": (pa.array([b"a"]), ["a"]),
    "binary": (pa.array([NOT_UTF8]), None),
    "large binary": (pa.array([NOT_UTF8], pa.large_binary()), None),
    "fixed binary": (pa.array([UUID.bytes], pa.binary(16)), ["\0" * 15 + "\3"]),
    "binary view": (pa.array([NOT_UTF8], pa.binary_view()), None),
    "dictionary of binary": (pa.array([NOT_UTF8]).dictionary_encode(), None),
    "text that is not UTF-8": (_text_that_is_not_utf8(), None),
    "texts": (pa.array([["a"], None]), [["a"], None]),
    "texts of two": (pa.array([["a", "b"]], pa.list_(pa.string(), 2)), [["a", "b"]]),
    "texts in a view": (pa.array([["a"]], pa.list_view(pa.string())), [["a"]]),
    "large texts": (pa.array([["a"]], pa.large_list(pa.large_string())), [["a"]]),
    "texts from a dictionary": (pa.array([["a"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))), [["a"]]),
    "a text missing": (pa.array([["a", None]]), [["a", None]]),
    "numbers": (pa.array([[1.5, float("nan")]]), ["[1.5, null]"]),
    "struct": (pa.array([{"a": float("nan"), "b": [1]}]), ['{"a": null, "b": [1]}']),
    "map": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), ['[["a", 1]]']),
    "binary in a struct": (pa.array([{"a": NOT_UTF8}]), None),
    "times out of range": (pa.array([[2**62]], pa.list_(pa.timestamp("s"))), None),
}


@pytest.mark.parametrize("name", ARROW)
def test_every_arrow_type_is_read_or_refused(name):
    array, expected = ARROW[name]
    column = pa.chunked_array([array])
    if expected is None:
        with pytest.raises(UnreadableColumnError, match=r"leave (it|the column) out"):
            read_as_text(column)
    else:
        assert read_as_text(column).values.to_pylist() == expected


# Values as JSON and CSV write them.
VALUES = [
    *("null", "NaN", "Infinity", "-Infinity", "true", "0", "-1", "1.5", "1e400", "9" * 30, "12"),
    *('""', '" "', '"x"', '"a.mp4"', '"yes"', '"NaN"', '"\\ud800"', '"\\u0000"', '"[\\"a\\", \\"b\\"]"', '"[1"'),
    *("[]", "[null]", '["a.jpg"]', '["a.jpg", null]', '["x", "y"]', "[1, 2]", "[NaN]", "[[]]", '["\\ud800"]', "{}"),
    *('{"a": {"b": NaN}}', "[" * 30000, "[" * 30000 + "]" * 30000, '"' + "[" * 30000 + '"', '"' + "a" * 200_000 + '"'),
]
ODD_NAMES = ["", " uri", "Prompt", "note", "field:note", "a\nb", "\ud800", "\0", "e" * 300]


def _jsonl(column, value):
    rows = ['{"uri": "a.mp4", "question": "q"}', '{"uri": "b.mp4", "question": "q"}']
    if column in {"uri", "question"}:
        rows[0] = '{"uri": "a.mp4"}' if column == "question" else '{"question": "q"}'
    return "\n".join([rows[0][:-1] + f", {json.dumps(column)}: {value}}}", rows[1]]).encode()


def _csv(column, value):
    out = io.StringIO()
    writer = csv.writer(out)
    names = ["uri", "question", *([] if column in {"uri", "question"} else [column])]
    writer.writerow(names)
    writer.writerow([value if name == column else {"uri": "a.mp4", "question": "q"}[name] for name in names])
    return out.getvalue().encode("utf-8", "surrogatepass")


def _parquet(column, array):
    num_rows = len(array)
    columns = {"uri": [f"{n}.mp4" for n in range(num_rows)], "question": ["q"] * num_rows, column: array}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _manifests():
    """(format, column, value, content): every value in every known column of every format, and odd names."""
    for column in KNOWN_COLUMNS:
        for value in VALUES:
            yield "m.jsonl", column, value[:40], _jsonl(column, value)
            yield "m.csv", column, value[:40], _csv(column, value)
    for column in ODD_NAMES:
        for value in ("null", '"x"', "[NaN]"):
            yield "m.jsonl", column, value, _jsonl(column, value)
            yield "m.csv", column, value, _csv(column, value)
    for column in (*KNOWN_COLUMNS, "note"):
        for name, (array, _) in ARROW.items():
            try:
                yield "m.parquet", column, name, _parquet(column, array)
            except pa.ArrowException:  # Parquet has no such type
                continue


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
def test_no_manifest_ends_in_a_defect(config, tmp_path, capsys, every):
    """Types times columns times formats, of both tasks: what is built survives its frozen file."""
    tasks = (CaptionConfig(), QuestionConfig(), QuestionConfig(metric="multiple_choice"))
    folder, outcomes = str(tmp_path), {0: 0, 2: 0}
    for name, column, value, content in itertools.islice(_manifests(), 0, None, every):
        uri = os.path.join(folder, name)
        with open(uri, "wb") as file:
            file.write(content)
        for task in tasks if column in {"reference", "options", "metric", "question"} else tasks[:1]:
            job = config(input={"manifest": uri}).model_copy(update={"task": task})

            def plan(job=job):
                manifest = build_manifest(job)
                assert read_manifest(manifest_bytes(manifest)).items == manifest.items
                return 0

            exit_code = guarded(plan, debug=False)
            said = capsys.readouterr().err
            assert exit_code in outcomes, (name, column, value, said)
            assert exit_code == 0 or f"manifest {folder}" in said, (name, column, value, said)
            outcomes[exit_code] += 1
    assert min(outcomes.values()) > 200 // every

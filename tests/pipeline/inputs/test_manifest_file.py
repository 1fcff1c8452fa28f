"""Tests that manifest files of every format become one frozen, validated manifest, or are refused with their lines."""

import json
import time
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import QuestionConfig
from pipeline.errors import InputError
from pipeline.inputs.build_manifest import build_manifest
from pipeline.inputs.manifest import manifest_bytes, read_manifest
from pipeline.storage import storage
from tests.support.runs.run_folders import put_manifest

ROWS = [
    {"item_id": "one", "uri": "a.mp4", "question": "Why?", "options": ["x", "y"], "reference": "x", "width": 12},
    {"item_id": "two", "uri": "sub/b.png", "category": "c", "note": "grüße"},
]


def as_jsonl(rows):
    return "\n\n".join(json.dumps(row) for row in rows).encode()


def as_csv(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names)]
    for row in rows:
        cells = [json.dumps(v) if isinstance(v, list) else str(v) for v in (row.get(n, "") for n in names)]
        lines.append(",".join('"' + cell.replace('"', '""') + '"' for cell in cells))
    return ("\ufeff" + "\r\n".join(lines)).encode()


def as_parquet(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), sink)
    return sink.getvalue().to_pybytes()


def two_columns_of_one_name():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([["a.mp4"], ["b.mp4"]], names=["uri", "uri"]), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("name", "encode"), [("m.jsonl", as_jsonl), ("m.csv", as_csv), ("m.parquet", as_parquet)])
def test_a_manifest_file_reads_the_same_from_every_format(config, root, name, encode):
    uri = put_manifest(root, name, encode(ROWS))
    first, second = build_manifest(config(input={"manifest": uri})).items
    assert (first.item_id, first.uris, first.media_kind) == ("one", (storage.join(root, "a.mp4"),), "video")
    assert (first.prompt, first.options, first.reference, first.category) == ("Why?", ("x", "y"), "x", None)
    assert first.fields["width"] == "12"
    assert second.uris == (storage.join(root, "sub/b.png"),)
    assert (second.media_kind, second.prompt, second.category) == ("image", None, "c")
    assert second.fields["note"] == "grüße"
    assert (first.sizes, first.etags) == ((-1,), ("",))


def test_user_order_is_kept_and_relative_addresses_resolve_against_the_prefix(config, root):
    uri = put_manifest(root, "lists/m.csv", "uri,id\nz.mp4,9\ns3://bucket/a.mp4,1\n")
    manifest = build_manifest(config(input={"manifest": uri, "uri": storage.join(root, "base/")}))
    assert [item.item_id for item in manifest.items] == ["9", "1"]
    assert manifest.items[0].uris == (storage.join(root, "base/z.mp4"),)


def test_image_sets_and_given_kinds_sizes_and_tags(config, root):
    rows = [{"uris": ["a.jpg", "b.png"]}, {"uris": ["c.jpg"]}, {"uris": ["page"], "media_kind": "image"}]
    manifest = build_manifest(config(input={"manifest": put_manifest(root, "m.jsonl", as_jsonl(rows))}))
    assert [item.media_kind for item in manifest.items] == ["images", "image", "image"]
    assert len(manifest.items[0].uris) == len(manifest.items[0].sizes) == len(manifest.items[0].etags) == 2
    uri = put_manifest(root, "m.csv", 'uri,size,etag\na.mp4,12,"""abc"""\nb.mp4,,\n')
    first, second = build_manifest(config(input={"manifest": uri})).items
    assert (first.sizes, first.etags, first.fields) == ((12,), ("abc",), {})
    assert (second.sizes, second.etags) == ((-1,), ("",))


def test_several_questions_about_one_medium_are_several_items(config, root):
    uri = put_manifest(root, "m.csv", "uri,question\na.mp4,Who?\na.mp4,Where?\n")
    items = build_manifest(config(input={"manifest": uri})).items
    assert len({item.item_id for item in items}) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "uri\na.mp4\nb.mp4\na.mp4\n", r"lines 2, 4: the same item id"),
        ("m.jsonl", '{"uri":"a.mp4","id":"x"}\n\n{"uri":"b.mp4","id":"x"}\n', r"lines 1, 3: the same item id 'x'"),
        ("m.csv", "uri,item_id\na.mp4,1\nb.mp4,\n", "line 3: an empty item id"),
        ("m.csv", "uri\na.mp4\nhttp://h/b.mp4\n", r"line 3: refused address.*scheme 'http'"),
        ("m.csv", "uri\n../b.mp4\n", r"line 2.*'\.\.' segments"),
        ("m.csv", "uri\nsimplecache::s3://b/x.mp4\n", "line 2.*chains"),
        ("m.csv", "uri\n/etc/passwd.mp4\n", r"line 2.*outside the allowed folders.*set input\.uri"),
        ("m.jsonl", '{"uri":"a\\nb.mp4"}', "line 1.*control characters"),
        ("m.jsonl", '{"uri":"a\\u2028b.mp4"}', "line 1.*control characters"),
        ("m.csv", "uri\na.mp4\nb.xyz\nc\n", "lines 3, 4: unknown media kind"),
        ("m.csv", "uri,media_kind\na.mp4,movie\n", "line 2: unknown media kind"),
        ("m.jsonl", '{"uris":["a.mp4","b.mp4"]}', "line 1: .*image set"),
        ("m.jsonl", '{"uris":[]}\n{"uris":["a.jpg"]}', "line 1: no URI"),
        ("m.csv", "uri,x\n,1\n", "line 2: no URI"),
        ("m.csv", "path\na.mp4\n", r"one column, `uri` or `uris`.*columns are: path"),
        ("m.csv", "uri\n", "has no rows"),
        ("m.jsonl", "", "has no rows"),
        ("m.csv", "uri,x\na.mp4\n", "line 2: 1 values under 2 columns"),
        ("m.csv", "uri,uri\na,b\n", "two columns of one name"),
        ("m.jsonl", '{"uri":"a.mp4"}\n{oops', "line 2: not JSON"),
        ("m.jsonl", '["a.mp4"]', "line 1: expected an object, got list"),
        ("m.jsonl", '{"uri":"a\\ud800.mp4"}', "not valid Unicode"),
        ("m.csv", b"uri\n\xff.mp4\n", "line 2: not UTF-8"),
        ("m.parquet", b"nothing", "not a readable Parquet file"),
        ("m.txt", "uri\n", "must end in one of"),
        ("m.csv", "uri,prompt,question\na.mp4,x,y\n", "both columns `prompt` and `question`"),
        ("m.csv", "uri,options\na.mp4,x\n", "line 2: column `options`"),
        ("m.csv", "uri,size\na.mp4,big\n", "line 2: column `size`"),
        (
            "m.parquet",
            as_parquet([{"uri": "a.mp4", "key": b"\xff"}]),
            "column 'key': binary whose bytes are not UTF-8.*leave",
        ),
        ("m.jsonl", '{"uri":["a.mp4"]}', "column `uri` holds lists; name it `uris`"),
        ("m.jsonl", '{"uri":"a.mp4","reference":["x",1]}', "line 1: column `reference`: not a JSON array of texts"),
        ("m.jsonl", '{"uri":"a.mp4","reference":{"x":1}}', "line 1: column `reference`: not a JSON array of texts"),
        (
            "m.jsonl",
            '{"uri":"a.mp4"}\n{"uri":["b.mp4"]}',
            "line 2: column `uri` holds lists or objects; name it `uris`",
        ),
        ("m.jsonl", '{"uri":"a.mp4"}\n\n{"uri":"b.mp4","prompt":{}}', "line 3: column `prompt` holds lists or objects"),
        (
            "m.jsonl",
            '{"uri":"a.mp4","question":"q"}\n{"uri":"b.mp4","question":["q"]}',
            "line 2: column `question` holds",
        ),
        (
            "m.parquet",
            as_parquet([{"uri": "a.mp4", "prompt": {"x": 1}}]),
            "row 1: column `prompt` holds lists or objects",
        ),
        ("m.parquet", as_parquet([{"uris": ["a.jpg"]}, {"uris": ["b.jpg", None]}]), "row 2: column `uris`: .*missing"),
        ("m.jsonl", "[" * 30000, "line 1: JSON nested too deep"),
        ("m.jsonl", '{"uri":"a.mp4","\\ud800":1}', "column .*not valid Unicode"),
        ("m.parquet", two_columns_of_one_name(), "two columns of one name"),
        ("m.csv", " URI ,x\na.mp4,1\n", "columns are:  URI , x; did you mean ' URI '. rename it"),
        ("m.csv", "x,path\n1,a.mp4\n", "did you mean 'path'. rename it"),
        *(
            ("m.jsonl", json.dumps({"uri": "a.mp4", name: ["x"]}), "holds lists; give one text a row")
            for name in ("id", "item_id", "prompt", "question", "question_id", "category", "media_kind", "size", "etag")
        ),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused_with_its_lines(config, tmp_path, name, content, message):
    uri = put_manifest(str(tmp_path), name, content)
    with pytest.raises(InputError, match=message):
        build_manifest(config(input={"manifest": uri}))


def test_a_missing_value_is_null_in_every_format_and_depth(config, tmp_path):
    """NaN is how Python's JSON and pandas write it: it is no question, and no reference to score against."""
    nan = float("nan")
    rows = [{"uri": "a.mp4", "prompt": nan, "reference": nan, "n": nan, "deep": {"x": [nan]}}, {"uri": "b.mp4"}]
    rows[1] |= {"prompt": "ok", "reference": "x", "n": 1.5}
    texts = {"prompt": [None, "ok"], "reference": [None, "x"]}
    floats = pa.table({"uri": ["a.mp4", "b.mp4"], **texts, "n": [nan, 1.5], "deep": [{"x": [nan]}, None]})
    sink = pa.BufferOutputStream()
    pq.write_table(floats, sink)
    for name, content in (("m.jsonl", as_jsonl(rows)), ("m.parquet", sink.getvalue().to_pybytes())):
        first, second = build_manifest(config(input={"manifest": put_manifest(str(tmp_path), name, content)})).items
        assert (first.prompt, first.reference, first.fields) == (None, None, {"deep": '{"x": [null]}'})
        assert (second.prompt, second.reference, second.fields) == ("ok", "x", {"n": "1.5"})
    asked = config(input={"manifest": str(tmp_path / "m.jsonl")}).model_copy(update={"task": QuestionConfig()})
    with pytest.raises(InputError, match="line 1: no question"):
        build_manifest(asked)


def test_several_accepted_answers_are_a_list_or_its_json(config, tmp_path):
    rows = [{"uri": "a.mp4", "reference": ["x", "y"]}, {"uri": "b.mp4", "reference": '["x", "y"]'}]
    rows += [{"uri": "c.mp4", "reference": "x"}, {"uri": "d.mp4", "reference": []}, {"uri": "e.mp4"}]
    expected = ['["x", "y"]', '["x", "y"]', "x", None, None]
    uri = put_manifest(str(tmp_path), "m.jsonl", as_jsonl(rows))
    assert [item.reference for item in build_manifest(config(input={"manifest": uri})).items] == expected
    lists = [{**row, "reference": None if row.get("reference") == "x" else row.get("reference")} for row in rows]
    lists[1]["reference"] = ["x", "y"]
    uri = put_manifest(str(tmp_path), "m.parquet", as_parquet(lists))
    found = [item.reference for item in build_manifest(config(input={"manifest": uri})).items]
    assert found == ['["x", "y"]', '["x", "y"]', None, None, None]


def test_uuids_are_ids(config, tmp_path):
    ids = [uuid.UUID(int=n) for n in (1, 2)]
    stored = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([value.bytes for value in ids], pa.binary(16)))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"uri": ["a.mp4", "b.mp4"], "item_id": stored}), sink)
    uri = put_manifest(str(tmp_path), "m.parquet", sink.getvalue().to_pybytes())
    assert build_manifest(config(input={"manifest": uri})).item_ids() == [str(value) for value in ids]


@pytest.mark.parametrize(
    ("header", "notes"),
    [
        ("uri, prompt", [("' prompt'", "'prompt'")]),
        ("uri,Question", [("'Question'", "'question'")]),
        ("uri,promt,Item ID", [("'Item ID'", "'item_id'"), ("'promt'", "'prompt'")]),
        ("uri,questions,references", [("'questions'", "'question'"), ("'references'", "'reference'")]),
        ("uri,media kind,e-tag", [("'e-tag'", "'etag'"), ("'media kind'", "'media_kind'")]),
        ("uri,prompt,prompts,split,label,id,ids,uri_of_page", []),
        ("uri,question,prompt_id,caption,width,answer_type", []),
    ],
)
def test_a_column_that_is_nearly_called_as_one_that_is_read_is_told(config, tmp_path, caplog, header, notes):
    names = header.split(",")
    uri = put_manifest(str(tmp_path), "m.csv", f"{header}\n" + ",".join(["a.mp4", *("x" for _ in names[1:])]) + "\n")
    with caplog.at_level("INFO", "pipeline"):
        build_manifest(config(input={"manifest": uri}))
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(": column ")[2] for line in told] == [
        f"{name} is only kept in the rows' `fields`; did you mean {meant}?" for name, meant in notes
    ]


def test_a_metric_for_each_row_is_one_text(config, tmp_path):
    uri = put_manifest(str(tmp_path), "m.jsonl", '{"uri":"a.mp4","question":"Why?","reference":"x","metric":["exact"]}')
    task = QuestionConfig(kind="question", metric="exact_match")
    asked = config(input={"manifest": uri}).model_copy(update={"task": task})
    with pytest.raises(InputError, match="column `metric` holds lists"):
        build_manifest(asked)


def test_a_damaged_frozen_manifest_is_told(config, root):
    uri = put_manifest(root, "m.jsonl", as_jsonl(ROWS))
    whole = manifest_bytes(build_manifest(config(input={"manifest": uri})))
    middle = len(whole) - 40  # in the footer: pyarrow raises an OSError there, no class of its own
    for damaged in (b"", whole[:50], whole[:middle] + b"\xff" * 20 + whole[middle + 20 :]):
        with pytest.raises(InputError, match="frozen manifest cannot be read"):
            read_manifest(damaged)


def test_the_frozen_manifest_survives_its_file(config, root):
    rows = [*ROWS, {"item_id": "three", "uris": None, "uri": "c.mp4", "nested": {"a": [1]}}]
    manifest = build_manifest(config(input={"manifest": put_manifest(root, "m.jsonl", as_jsonl(rows[:2]))}))
    again = read_manifest(manifest_bytes(manifest))
    assert again.items == manifest.items
    assert again.digest == manifest.digest
    with pytest.raises(InputError, match="cannot be read"):
        read_manifest(manifest_bytes(manifest)[:-20])
    with pytest.raises(InputError, match="not a frozen manifest"):
        read_manifest(as_parquet(ROWS))


@pytest.mark.parametrize("column", ["item_id", "uri", "question", "reference", "category", "options", "width", "note"])
def test_the_digest_follows_every_column(config, tmp_path, column):
    def digest(rows):
        uri = put_manifest(str(tmp_path), "m.jsonl", as_jsonl(rows))
        return build_manifest(config(input={"manifest": uri})).digest

    changed = [dict(row) for row in ROWS]
    row = next(row for row in changed if column in row)
    row[column] = ["x", "z"] if column == "options" else f"{row[column]}.mp4"
    assert digest(changed) != digest(ROWS)
    assert digest(ROWS[::-1]) != digest(ROWS)


def test_the_digest_does_not_depend_on_chunks():
    from pipeline.inputs.manifest import _content_digest

    texts = pa.array(["a", None, "", "grüße", "b"])
    lists = pa.array([["a"], [], None, ["b", "c"], ["d"]])
    whole = pa.table({"t": texts, "l": lists})
    pieces = pa.concat_tables([whole.slice(0, 2), whole.slice(2, 2), whole.slice(4)])
    assert pieces["t"].num_chunks == 3
    assert _content_digest(pieces) == _content_digest(whole)
    moved = pa.table({"t": pa.array(["a", "", None, "grüße", "b"]), "l": lists})
    assert _content_digest(moved) != _content_digest(whole)


@pytest.mark.long
@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.parquet"])
def test_a_million_rows_are_planned_in_twenty_seconds(config, tmp_path, name):
    num_rows = 1_000_000
    uris = [f"s3://bucket/videos/{n // 1000:04d}/clip-{n:07d}.mp4" for n in range(num_rows)]
    if name == "m.parquet":
        pq.write_table(pa.table({"uri": uris, "label": [str(n) for n in range(num_rows)]}), tmp_path / name)
    elif name == "m.csv":
        (tmp_path / name).write_text("uri,label\n" + "".join(f"{uri},{n}\n" for n, uri in enumerate(uris)))
    else:
        (tmp_path / name).write_text("".join(f'{{"uri":"{uri}","label":{n}}}\n' for n, uri in enumerate(uris)))
    began_s = time.process_time()  # of this process: others share the machine
    manifest = build_manifest(config(input={"manifest": str(tmp_path / name)}))
    frozen = read_manifest(manifest_bytes(manifest))
    took_s = time.process_time() - began_s
    assert frozen.digest == manifest.digest
    assert len(frozen) == num_rows
    assert took_s < 20, f"{took_s:.1f} s"

"""`illava export`: real run folders as CSV, JSON, JSON lines and Markdown. Time: 1 s of one core."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.inspection.export import FORMATS, export_run
from pipeline.records import ResultRow
from pipeline.runs.parquet_sink import read_parts, read_rows, result_rows
from tests.support.runs.run_folders import complete, make_config, put_media

RUNS = Path(__file__).parents[1] / "runs" / "data" / "runs_27c8a0a"
COLUMNS = list(ResultRow.__slots__)


def export(run: str, file_format: str, to: Path, capsys) -> str:
    assert main(["export", str(RUNS / run), "--format", file_format, "--to", str(to)]) == 0
    return capsys.readouterr().out


def stored(run: str) -> list[dict]:
    """The rows as Parquet has them, read by what `export` does not use, as JSON types."""
    parts = sorted((RUNS / run / "data").iterdir())
    rows = [asdict(row) for part in parts for row in result_rows(read_rows(str(part)))]
    return json.loads(json.dumps(rows))


@pytest.mark.parametrize("run", ["finished", "questions", "documents"])
def test_json_and_json_lines_hold_every_column_of_every_row(run, tmp_path, capsys) -> None:
    assert export(run, "json", tmp_path / "a.json", capsys) == f"{tmp_path}/a.json: {len(stored(run))} rows\n"
    export(run, "jsonl", tmp_path / "a.jsonl", capsys)
    rows = json.loads((tmp_path / "a.json").read_text())
    assert rows == stored(run)
    assert [list(row) for row in rows] == [COLUMNS] * len(rows)
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == rows


def test_csv_holds_every_column_with_lists_as_json_and_nulls_empty(tmp_path, capsys) -> None:
    export("questions", "csv", tmp_path / "a.csv", capsys)
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(stored("questions")) == 2
    for row, there in zip(rows, stored("questions"), strict=True):
        assert list(row) == COLUMNS
        for name, value in there.items():
            nested = isinstance(value, list | dict)
            assert (json.loads(row[name]) if nested else row[name]) == (
                value if nested else "" if value is None else str(value)
            )


def test_markdown_is_a_table_of_what_was_asked_and_answered(tmp_path, capsys) -> None:
    export("questions", "md", tmp_path / "a.md", capsys)
    head, _, first, _ = (tmp_path / "a.md").read_text().splitlines()
    assert head == "| uri | prompt | text | reference | score | status |", "columns without any value are left out"
    assert "Which?<br>A. red<br>B. blue<br>Answer with a letter." in first
    assert first.endswith("| A | 0.0 | ok |")


def parted(path: Path) -> tuple[dict, str]:
    """A document's front matter, and the text behind it."""
    _, front, text = path.read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(front), text.removeprefix("\n")


def document(tmp_path, *uris: str, **more) -> str:
    """A run folder like the stored one of documents, with rows of these addresses."""
    import pyarrow.parquet as pq

    shutil.copytree(RUNS / "documents", tmp_path / "run")
    [part] = (tmp_path / "run" / "data").iterdir()
    table = pq.read_table(part)
    [row] = table.to_pylist()
    rows = [row | {"item_id": f"item-{n}", "uri": uri} | more for n, uri in enumerate(uris)]
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), part)
    return str(tmp_path / "run")


def test_a_document_is_a_file_with_its_pages_in_order(tmp_path, capsys) -> None:
    """The second page failed; it is said where it stands."""
    assert export("documents", "md", tmp_path / "out", capsys) == f"{tmp_path}/out/: 1 documents\n"
    [row] = stored("documents")
    first, failed, third = row["pages"]
    front, text = parted(tmp_path / "out" / "three.md")
    assert text == f"{first['text']}\n\n<!-- page 2: {failed['error_type']} -->\n\n{third['text']}\n"
    assert (front["uri"], front["status"], front["model_id"]) == (row["uri"], "partial", row["model_id"])
    assert (front["pages_read"], front["pages_failed"]) == (2, [2])
    assert front["error_message"] == row["error_message"]


def test_pages_answered_together_stand_where_the_first_does(tmp_path) -> None:
    page = {"status": "ok", "error_type": None, "text": None}
    pages = [page | {"page": 0, "text": "one and two"}, page | {"page": 1}, page | {"page": 2, "text": "three"}]
    export_run(document(tmp_path, "s3://bucket/a.pdf", pages=pages), "md", str(tmp_path / "out"))
    assert parted(tmp_path / "out" / "a.md")[1] == "one and two\n\nthree\n"


def test_front_matter_is_yaml_whatever_a_manifest_holds(tmp_path) -> None:
    hostile = {"title": "a: b\n---\n# x", "note": "\u2028\x85\U0001f600 'q' \"", "n": "007", "yes": "no"}
    export_run(document(tmp_path, "s3://b/a.pdf", fields=list(hostile.items())), "md", str(tmp_path / "out"))
    assert parted(tmp_path / "out" / "a.md")[0]["fields"] == hostile


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_cell_of_csv_is_no_formula(tmp_path, text) -> None:
    """Only texts are guarded: a negative number is none."""
    run = document(tmp_path, "s3://b/a.pdf", text=text, error_message="fine", score=-1.5)
    export_run(run, "csv", f"{tmp_path}/a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["text"], row["error_message"], row["score"]) == (f"'{text}", "fine", "-1.5")
    export_run(run, "jsonl", f"{tmp_path}/a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text())["text"] == text, "JSON is read by no spreadsheet"


@pytest.mark.parametrize("file_format", FORMATS)
def test_rows_are_written_while_they_are_read(tmp_path, monkeypatch, file_format) -> None:
    """The run has 40 parts; when the first row is written, eight of them have been asked for."""
    shutil.copytree(RUNS / "questions", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"num_shards": 40}))
    for index in range(1, 40):
        shutil.copy(tmp_path / "run/data/part-00000.parquet", tmp_path / f"run/data/part-{index:05d}.parquet")
    asked, seen = [], []

    def read(uri, indexes, columns=None):
        asked.extend(indexes)
        return read_parts(uri, indexes, columns)

    def write(_to, chunks):
        whole = 80 if file_format == "md" else 0  # a table is read twice: first for the columns that have values
        for number, chunk in enumerate(chunks):
            seen.append(chunk)
            assert len(asked) <= whole / 2 + 8 or number > 8

    monkeypatch.setattr("pipeline.inspection.export.read_parts", read)
    monkeypatch.setattr("pipeline.inspection.export.storage.write_stream", write)
    said = export_run(str(tmp_path / "run"), file_format, f"{tmp_path}/a")
    assert said.endswith(": 80 rows")
    assert len(asked) == (80 if file_format == "md" else 40)
    assert len(seen) >= 80


PRIVATE = {"uri": "SECRETNAME", "prompt": "SECRETPROMPT", "fields": "SECRETFIELD"}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("kind", PRIVATE)
def test_what_is_left_out_stands_nowhere(tmp_path, file_format, kind) -> None:
    """A page's message and the row's own name files; so does a document's file."""
    page = {"status": "ok", "error_type": None, "text": "read", "page": 0, "error_message": None}
    lost = page | {"page": 1, "status": "failed", "error_type": "not_found", "error_message": "no SECRETNAME.png"}
    rows = {
        "uris": ["s3://b/SECRETNAME.pdf"],
        "error_message": "SECRETNAME.pdf is cut",
        "prompt": "SECRETPROMPT",
        "options": ["SECRETPROMPT"],
        "fields": [("owner", "SECRETFIELD")],
        "pages": [page, lost],
    }
    run, to = document(tmp_path, "s3://b/SECRETNAME.pdf", **rows), tmp_path / "out"
    target = to if file_format == "md" else to / f"a.{file_format}"

    def exported(*words: str) -> str:
        assert main(["export", run, "--format", file_format, "--to", str(target), *words]) == 0
        return "".join(f"{path.name}\n{path.read_text()}" for path in to.iterdir())

    shown = [word for word in PRIVATE.values() if word in exported()]
    assert PRIVATE[kind] in shown or (file_format, kind) == ("md", "prompt"), "files of documents say no prompt"
    shutil.rmtree(to)
    text = exported("--without", kind)
    assert [word for word in PRIVATE.values() if word in text] == [word for word in shown if word != PRIVATE[kind]]
    assert "read" in text
    shutil.rmtree(to)
    assert not any(word in exported("--without", "uri,prompt,fields,frames") for word in PRIVATE.values())


def test_an_unknown_word_to_leave_out_is_refused(tmp_path, capsys) -> None:
    command = ["export", str(RUNS / "finished"), "--format", "csv", "--to", f"{tmp_path}/a.csv", "--without", "uris"]
    assert main(command) == 2
    assert "--without uris: there are uri, prompt, fields, frames" in capsys.readouterr().err


def test_documents_of_one_name_and_of_bad_names_have_a_file_each_below_the_folder(tmp_path) -> None:
    uris = (
        "s3://b/x/a.pdf",
        "s3://b/y/A.PDF",
        "s3://b/..pdf",
        "s3://b/n o|t.e.pdf",
        "s3://b/noend",
        "s3://b/\u00fc.pdf",
    )
    said = export_run(document(tmp_path, *uris), "md", str(tmp_path / "out"))
    assert said.endswith("6 documents")
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.md"))
    assert len(names) == len({name.casefold() for name in names}) == 6
    assert {"_.md", "n_o_t.e.md", "item-4.md", "\u00fc.md"} < set(names)
    assert [name.partition("-")[0] for name in names if name[:2] in ("A-", "a-")] == ["A", "a"]


def test_a_document_without_pages_has_no_file_and_is_told(tmp_path, caplog) -> None:
    assert export_run(document(tmp_path, "s3://b/a.pdf", pages=None), "md", str(tmp_path / "out")).endswith(
        "0 documents"
    )
    assert "1 documents could not be opened and have no file" in caplog.text
    assert not (tmp_path / "out").exists()


def test_an_erased_document_has_no_file_and_is_told_apart_from_one_that_could_not_be_opened(tmp_path, caplog) -> None:
    uri = document(tmp_path, "s3://b/a.pdf", pages=None, status="erased")
    assert export_run(uri, "md", str(tmp_path / "out")).endswith("0 documents")
    assert "1 documents are erased and have no file" in caplog.text
    assert "could not be opened" not in caplog.text


def test_an_unfinished_run_gives_what_is_published_and_says_so(tmp_path, capsys) -> None:
    assert main(["export", str(RUNS / "interrupted"), "--format", "csv", "--to", f"{tmp_path}/a.csv"]) == 0
    assert "1 of 2 parts are published; the others are left out" in capsys.readouterr().err


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "exit_code", "said"),
    [
        ("none --format csv --to a.csv", 4, "holds no run"),
        (
            "finished --format csv --to .",
            2,
            "--to . is a folder; csv is one file: give its name, such as --to ./rows.csv",
        ),
        ("finished --format md --to out/", 2, "--to out/rows.md"),
        ("documents --format md --to file", 2, "--to file is a file; the run's documents are one file"),
    ],
)
def test_a_place_that_does_not_fit_is_refused(command, exit_code, said, capsys, in_tmp_path) -> None:
    Path("file").touch()
    assert main(f"export {RUNS}/{command}".split()) == exit_code
    assert said in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_rows_from_a_store_to_a_store(root, model_folder) -> None:
    """And a run without a row has nothing to write."""
    from pipeline.errors import InputError
    from pipeline.runs.run import open_run
    from pipeline.storage import storage

    put_media(storage.join(root, "in"), 3)
    sections = {"input": {"uri": storage.join(root, "in")}, "output": {"uri": storage.join(root, "out")}}
    run = open_run(make_config(model_folder, **sections))
    with pytest.raises(InputError, match="no row yet"):
        export_run(run.uri, "jsonl", storage.join(root, "rows.jsonl"))
    complete(run)
    export_run(run.uri, "jsonl", storage.join(root, "rows.jsonl"))
    items = [json.loads(line)["item_id"] for line in storage.read(storage.join(root, "rows.jsonl")).splitlines()]
    assert items == [item.item_id for index in range(run.num_shards) for item in run.shard(index).items]

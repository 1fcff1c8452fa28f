"""Encrypted PDFs open by a manifest's column or the environment; their passwords stand nowhere else. Time: 2 s."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.execution.runner import build_loader, continue_run, run_job
from pipeline.inputs.build_manifest import build_manifest
from pipeline.records import MediaItem
from pipeline.report.write import write_report
from pipeline.runs.retry import begin_retry
from tests.support.media.locked_pdf import write_locked_pdf
from tests.support.media.pdf_files import page, page_worker, write_pdf
from tests.support.runs.fakes import job_config, read_rows, violations
from tests.support.runs.misbehaving import Untouched

COLUMN, OTHER, WRONG = "CANARY-one", "CANÁRY2", "CANARY-wrong"


def loader_of(config, preprocessor):
    return build_loader(config, Untouched())


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three locked PDFs and an open one; all said by a manifest whose first two have a password, one a wrong one."""
    for name, number, password in (("a", 1, COLUMN), ("b", 2, OTHER), ("c", 3, OTHER)):
        write_locked_pdf(tmp_path / f"{name}.pdf", number, password)
    write_pdf(tmp_path / "open.pdf", [page(4)])
    rows(tmp_path, a=COLUMN, b=WRONG)
    return tmp_path


def rows(folder: Path, **passwords: str) -> None:
    lines = [{"id": name, "uri": f"{name}.pdf", "password": passwords.get(name)} for name in ("a", "b", "c", "open")]
    lines.append({"id": "again", "uri": "a.pdf", "password": None, "owner": "X"})
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))


def config_of(folder: Path, **more):
    return job_config(folder / "out", {"manifest": f"{folder}/items.jsonl"}, task={"kind": "document"}, **more)


def outcomes(folder: Path) -> dict[str, str]:
    return {row["item_id"]: row["text"] or row["error_type"] for row in read_rows(folder / "out")}


def stored(folder: Path) -> str:
    """Everything that the run folder says, Parquet read."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            found.append(f"{pq.read_table(path).to_pylist()} {pq.read_schema(path)}")
        elif path.is_file():
            found.append(path.read_bytes().decode("utf-8", "replace"))
    return "\n".join(found)


def test_a_locked_document_is_read_by_its_password_which_is_written_nowhere(folder, monkeypatch, caplog, capfd) -> None:
    caplog.set_level(logging.DEBUG)
    run_job(config_of(folder), worker_factory=page_worker, loader_factory=loader_of)
    locked = "encrypted_document"
    assert outcomes(folder) == {"a": "page 1", "again": "page 1", "b": locked, "c": locked, "open": "page 4"}
    messages = {row["item_id"]: row["error_message"] for row in read_rows(folder / "out")}
    assert "the password that was given for it does not open it" in messages["b"]
    assert "column `password`, or in ILLAVA_PDF_PASSWORD" in messages["c"]
    assert [dict(row["fields"]) for row in read_rows(folder / "out") if row["item_id"] == "again"] == [{"owner": "X"}]
    rows(folder, a=COLUMN)
    monkeypatch.setenv("ILLAVA_PDF_PASSWORD", OTHER)
    continue_run(begin_retry(f"{folder}/out"), worker_factory=page_worker, loader_factory=loader_of)
    assert set(outcomes(folder).values()) == {f"page {number}" for number in (1, 2, 3, 4)}
    assert violations(folder / "out") == []
    write_report(f"{folder}/out")
    said = caplog.text + "".join(capfd.readouterr()) + stored(folder / "out")
    assert [word for word in (COLUMN, OTHER, WRONG) if word in said] == []
    assert json.dumps(OTHER)[1:-1] not in said


def test_a_record_shows_no_password() -> None:
    item = MediaItem("a", ("a.pdf",), "document", (1,), ("",), passwords=(COLUMN,))
    assert COLUMN not in repr(item)


def test_a_run_goes_on_where_its_manifest_is_gone(folder, caplog) -> None:
    config = config_of(folder)
    run_job(config, worker_factory=page_worker, loader_factory=loader_of)
    (folder / "items.jsonl").unlink()
    run = begin_retry(f"{folder}/out", only=["encrypted_document"])
    continue_run(run, worker_factory=page_worker, loader_factory=loader_of)
    assert outcomes(folder)["b"] == "encrypted_document"
    assert "column `password` of the manifest cannot be read" in caplog.text


def test_a_password_that_came_is_tried_by_the_next_night_and_a_locked_file_is_not(folder) -> None:
    def night(number: int) -> list[str]:
        config = config_of(folder).model_dump()
        config["output"]["uri"] = f"{folder}/nights/{number}"
        config["input"]["exclude_runs"] = f"{folder}/nights"
        run_job(type(config_of(folder)).model_validate(config), worker_factory=page_worker, loader_factory=loader_of)
        return [row["item_id"] for row in read_rows(f"{folder}/nights/{number}")]

    rows(folder)
    assert night(1) == ["a", "b", "c", "open", "again"]
    rows(folder, b=OTHER)
    assert night(2) == ["b"]


@pytest.mark.parametrize("name", ["Password", "passwords", "pass_word", "pasword"])
def test_a_column_that_is_nearly_called_so_is_refused_since_rows_would_show_it(tmp_path, name) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({"uri": "a.pdf", name: COLUMN}))
    with pytest.raises(InputError, match="would be written into the rows; call it `password`") as error:
        build_manifest(config_of(tmp_path))
    assert COLUMN not in str(error.value)


@pytest.mark.parametrize("value", [["CANARY", 1], {"a": "CANARY"}])
def test_what_is_no_text_is_refused_without_its_value(tmp_path, value) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({"uri": "a.pdf", "password": value}))
    with pytest.raises(InputError, match="column `password` holds lists") as error:
        build_manifest(config_of(tmp_path))
    assert "CANARY" not in str(error.value)


def test_a_prompt_cannot_name_it(tmp_path) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({"uri": "a.pdf", "password": COLUMN}))
    config = job_config(
        tmp_path / "out",
        {"manifest": f"{tmp_path}/items.jsonl"},
        task={"kind": "document", "prompt_template": "{password}"},
    )
    with pytest.raises(InputError, match="no column 'password'") as error:
        build_manifest(config)
    assert COLUMN not in str(error.value)

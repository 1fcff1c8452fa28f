"""Tests `retry` of documents: pages that the model failed are asked again, others are not, and no page is lost."""

from __future__ import annotations

import json
from functools import partial

import pytest

from pipeline.execution.runner import build_loader, continue_run, run_job
from pipeline.runs.retry import begin_retry
from tests.support.media import pdf_files
from tests.support.media.pdf_files import page, write_pdf
from tests.support.runs.fakes import job_config, read_rows, violations
from tests.support.runs.misbehaving import Untouched

SCHEMA = {"type": "object", "properties": {"page": {"type": "integer", "maximum": 3}}, "required": ["page"]}
ANSWER = '{"page": {pages}}'  # page 4 is not what the schema asks for
LARGE = "0 0 999 999"


def loader(config, preprocessor):
    return build_loader(config, Untouched())


@pytest.fixture
def uri(tmp_path) -> str:
    """A run over four documents: pages fail as invalid answers, as too large for memory, as too large to be shown."""
    write_pdf(tmp_path / "good.pdf", [page(n) for n in range(2)])
    write_pdf(tmp_path / "invalid.pdf", [page(n) for n in range(3, 5)])
    write_pdf(tmp_path / "starved.pdf", [page(n) for n in range(3)])
    write_pdf(tmp_path / "unshown.pdf", [page(0), page(1, box=LARGE)])
    names = ("good", "invalid", "starved", "unshown")
    lines = [json.dumps({"id": name, "uri": f"{name}.pdf"}) for name in names]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    task = {"kind": "document", "output": "json", "json_schema": SCHEMA}
    media = {"page_dpi": 72, "max_pixels_per_frame": 200 * 200}
    config = job_config(tmp_path / "out", {"manifest": str(tmp_path / "items.jsonl")}, task=task, media=media)
    starving = partial(pdf_files.page_worker, answer=ANSWER, broken=(2,), error=MemoryError())
    assert run_job(config, worker_factory=starving, loader_factory=loader).exit_code == 0
    assert outcome(config.output.uri) == {
        "good": [None, None],
        "invalid": [None, "invalid_answer"],
        "starved": [None, None, "out_of_memory"],
        "unshown": [None, "too_large"],
    }
    return config.output.uri


def outcome(uri) -> dict[str, list[str | None]]:
    """Each document's error types, page by page."""
    return {row["item_id"]: [one["error_type"] for one in row["pages"]] for row in read_rows(uri)}


def retry(uri, *, only=(), loader=loader, **model) -> list[str]:
    """The command; the documents whose rows it made."""
    run, made = begin_retry(uri, only=only), []

    def worker(config, run_info):
        subject = pdf_files.page_worker(config, run_info, **model)
        add = subject.add
        subject.add = lambda loaded, **options: made.append(loaded.item.item_id) or add(loaded, **options)
        return subject

    continue_run(run, worker_factory=worker, loader_factory=loader)
    # Few rows of milliseconds on a busy machine: whether seconds add up is asked elsewhere.
    assert violations(uri) == []
    return made


def test_pages_that_the_model_failed_are_asked_again_and_a_page_that_cannot_be_shown_is_not(uri) -> None:
    before = {row["item_id"]: row for row in read_rows(uri)}
    assert retry(uri, answer='{"page": 0}') == ["invalid", "starved"]
    after = {row["item_id"]: row for row in read_rows(uri)}
    assert {name: row["status"] for name, row in after.items()} == {
        "good": "ok",
        "invalid": "ok",
        "starved": "ok",
        "unshown": "partial",
    }
    assert (after["good"], after["unshown"]) == (before["good"], before["unshown"])
    assert retry(uri) == []


@pytest.mark.parametrize(
    ("only", "again"),
    [("invalid_answer", ["invalid"]), ("out_of_memory", ["starved"]), ("too_large", ["unshown"]), ("not_found", [])],
)
def test_only_takes_the_error_types_of_pages(uri, only, again) -> None:
    assert retry(uri, only=[only], answer=ANSWER) == again


def test_a_retry_that_does_worse_leaves_the_published_pages(uri, tmp_path) -> None:
    """One document is gone, another fails a page more than before."""
    before = read_rows(uri)
    (tmp_path / "invalid.pdf").unlink()
    assert retry(uri, answer=ANSWER, broken=(1, 2)) == ["starved"]
    assert read_rows(uri) == before

"""`configs/demo_documents.yaml` as it stands: sample PDFs, read by the bundled model in this process.

Time: 5 s of one core, most of it the model's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.toy_model.data.render_pdfs import render
from pipeline.__main__ import main
from tests.support.runs.fakes import read_rows, violations

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = ROOT / "configs" / "demo" / "documents"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """The finished run; the file's own relative paths are the repository's."""
    uri = str(tmp_path_factory.mktemp("demo") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(["documents", "--config", "configs/demo_documents.yaml", "--set", f"output.uri={uri}"]) == 0
    return uri


def truth() -> dict[tuple[str, int], str]:
    rows = map(json.loads, (SAMPLES / "pages.jsonl").read_text().splitlines())
    return {(row["uri"], row["page"]): row["reference"] for row in rows}


def test_every_page_of_the_samples_is_read(run) -> None:
    """Five of six rightly, at least: another processor may tip a near-tie, a page that is not shown fails them all."""
    rows = read_rows(Path(run))
    read = {(Path(row["uri"]).name, page["page"]): page["text"] for row in rows for page in row["pages"]}
    assert read.keys() == truth().keys()
    assert {page["status"] for row in rows for page in row["pages"]} == {"ok"}
    assert sum(read[page] == text for page, text in truth().items()) >= 5
    assert violations(Path(run)) == []


def test_the_samples_are_what_their_script_draws(tmp_path) -> None:
    """Their truth at least: the bytes of a page are its JPEG's, which another release of Pillow may write otherwise."""
    render(tmp_path, 3)
    assert (tmp_path / "pages.jsonl").read_text() == (SAMPLES / "pages.jsonl").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in SAMPLES.iterdir()}

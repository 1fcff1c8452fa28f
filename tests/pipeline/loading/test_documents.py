"""Tests what documents are told to be: dynamic forms, encrypted and damaged ones, in any order, and cut-short pages.

About 1 s.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config.schema import MediaConfig
from pipeline.errors import ItemError
from pipeline.loading.decoding.pages import load_pages
from tests.support.media.adversarial_documents import PDFS
from tests.support.media.pdf_files import page, pdf_bytes, write_pdf
from tests.support.media.stream_writers import DATA
from tests.support.runs.misbehaving import Thumbnails

MEDIA = MediaConfig()
XFA = "/AcroForm << /Fields [] /XFA 4 0 R >>"


@pytest.fixture(autouse=True)
def _pillow_limit(monkeypatch):
    """Loading sets Pillow's limit for its process, which is a child's; here it is put back."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def told(path) -> tuple[str, str]:
    """The status or error type of a document, and the words."""
    try:
        pages = load_pages("document", [str(path)], MEDIA, Thumbnails(), pages_per_request=1)
    except ItemError as error:
        return error.error_type, str(error)
    return ("partial" if pages.partial else "ok"), pages.partial or ""


def form(extra: str) -> bytes:
    """A PDF whose catalog has these entries; object 4 is a stream."""
    return pdf_bytes(
        [
            f"<< /Type /Catalog /Pages 2 0 R {extra} >>",
            "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 200 100] >>",
            "<< /Length 5 >>\nstream\n<x/>\n\nendstream",
        ]
    )


def test_a_dynamic_form_has_a_type_of_its_own():
    error_type, words = told(DATA / "dynamic_xfa.pdf")
    assert error_type == "dynamic_form"
    assert "print it to a PDF" in words


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (f"/NeedsRendering true {XFA}", "dynamic_form"),
        (XFA, "ok"),  # a static form: its pages are the form
        ("/AcroForm << /Fields [] >>", "ok"),
        ("/NeedsRendering true", "ok"),
    ],
)
def test_only_forms_without_pages_of_their_own_are_dynamic(tmp_path, extra, expected):
    (tmp_path / "a.pdf").write_bytes(form(extra))
    assert told(tmp_path / "a.pdf")[0] == expected


def test_what_a_document_is_told_to_be_does_not_depend_on_the_one_before(tmp_path):
    paths = [DATA / name for name in ("a_encrypted.pdf", "b_damaged.pdf", "dynamic_xfa.pdf", "userunit.pdf")]
    for file in PDFS:
        file.write(tmp_path / file.name)
        paths.append(tmp_path / file.name)
    alone = {path: told(path) for path in [DATA / "b_damaged.pdf", *paths]}
    assert alone[DATA / "a_encrypted.pdf"][0] == "encrypted_document"
    assert alone[DATA / "b_damaged.pdf"] == ("corrupt_media", "the PDF cannot be opened: its structure is damaged")
    for before in paths:
        for path in paths:
            told(before)
            assert told(path) == alone[path], (before.name, path.name)


ROOT = Path(__file__).resolve().parents[3]
DIGESTS = """
import hashlib, sys
from pipeline.config.schema import MediaConfig
from pipeline.loading.decoding.pages import load_pages
class Digests:
    def images(self, pages):
        return [hashlib.sha256(page.tobytes()).hexdigest() for page in pages]
for path in sys.argv[1:]:
    print(*load_pages("document", [path], MediaConfig(), Digests(), pages_per_request=1).inputs)
"""


def test_the_font_that_stands_for_a_missing_one_does_not_depend_on_the_document_before(tmp_path):
    """In a process that has read no PDF: PDFium draws with a font otherwise once it has drawn with it."""
    text = "BT /F1 24 Tf 20 99 Td (Hamburgefonts) Tj ET"
    for font in ("Tahoma", "Foo"):
        (tmp_path / f"{font}.pdf").write_bytes(
            pdf_bytes(
                [
                    "<< /Type /Catalog /Pages 2 0 R >>",
                    "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
                    "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R "
                    "/Resources << /Font << /F1 5 0 R >> >> >>",
                    f"<< /Length {len(text)} >>\nstream\n{text}\nendstream",
                    f"<< /Type /Font /Subtype /TrueType /BaseFont /{font} >>",
                ]
            )
        )
    order = [str(tmp_path / f"{font}.pdf") for font in ("Tahoma", "Tahoma", "Foo", "Tahoma", "Foo")]
    done = subprocess.run([sys.executable, "-c", DIGESTS, *order], capture_output=True, text=True, cwd=ROOT, check=True)
    first, second, foo, third, again = done.stdout.splitlines()
    assert first == second == third
    assert foo == again


def test_no_reason_is_success(tmp_path):
    for file in PDFS:
        file.write(tmp_path / file.name)
        assert "Success" not in told(tmp_path / file.name)[1]


def test_a_user_unit_changes_no_size():
    """PDFium does not read /UserUnit: `page_dpi` counts dots per 72 units of the page's own space (docs say so)."""
    pages = load_pages("document", [str(DATA / "userunit.pdf")], MEDIA, Thumbnails(), pages_per_request=1)
    assert pages.inputs[0].original_size == (200, 200)


def test_a_page_that_is_cut_short_makes_the_document_partial(tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data[: int(len(data) * 0.93)])
    paths = [str(tmp_path / f"{name}.png") for name in "ab"]
    pages = load_pages("images", paths, MEDIA, Thumbnails(), pages_per_request=1)
    assert (len(pages.inputs), pages.failed) == (2, [])
    assert pages.partial.startswith("page 2: the picture is cut short: about 9")


def test_a_good_document_is_whole(tmp_path):
    assert told(write_pdf(tmp_path / "a.pdf", [page(1), page(2)])) == ("ok", "")

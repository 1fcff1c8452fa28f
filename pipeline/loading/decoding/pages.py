"""Renders documents to pages: PDFs by PDFium, TIFFs by Pillow; pictures are pages already. Runs in the sandbox child.

Pages are made one window at a time, so that a long document takes the memory of its tiles and not of its pages. A page
that cannot be shown fails alone. A document fails as a whole where all of its pages fail.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from illava.errors import PreprocessError
from pipeline.errors import ItemError
from pipeline.loading.decoding.pictures import Picture, load_image_pages, load_picture
from pipeline.records import FailedPage

if TYPE_CHECKING:
    import pypdfium2

    from illava.preprocess import Preprocessor, VisualInput
    from pipeline.config.schema import MediaConfig
    from pipeline.records import MediaKind

_HEAD_BYTES = 1024  # a PDF's header may follow so many other bytes
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WRONG_PASSWORD = 4  # FPDF_ERR_PASSWORD; 5 is a security handler that PDFium does not know
_ENCRYPTED = (_WRONG_PASSWORD, 5)
_POINTS_PER_INCH = 72

_REASONS = {1: "PDFium met an unknown error", 3: "it is no PDF, or damaged", 6: "its first page is missing or damaged"}
_NO_REASON = "its structure is damaged"

Page = Picture | ItemError


@dataclass(slots=True)
class Pages:
    """Holds the pages of one document.

    Attributes:
        inputs: one for each page that could be shown, in order, at model size.
        failed: the other pages.
        cut_short: pages among the first of which a part is missing, each with what is missing.
        decoder: ``pypdfium2`` or ``pillow``.
        preprocess_s: seconds of bringing pages to model size.
    """

    decoder: str
    inputs: list[VisualInput] = field(default_factory=list)
    failed: list[FailedPage] = field(default_factory=list)
    cut_short: list[tuple[int, str]] = field(default_factory=list)
    preprocess_s: float = 0.0

    @property
    def partial(self) -> str | None:
        """Names the pages that failed or are cut short; None where there is none."""
        parts = [f"page {page + 1}: {what}" for page, what in self.cut_short]
        if self.failed:
            first = self.failed[0]
            total = len(self.inputs) + len(self.failed)
            parts.insert(0, f"{len(self.failed)} of {total} pages failed; page {first.page + 1}: {first.message}")
        return "; ".join(parts) or None


def load_pages(
    kind: MediaKind,
    paths: Sequence[str],
    media: MediaConfig,
    preprocessor: Preprocessor,
    *,
    pages_per_request: int | None,
) -> Pages:
    """Load every page at model size.

    Args:
        kind: ``document`` for one PDF or TIFF; ``image`` or ``images`` for pictures, each a page.
        paths: local files.
        media: budgets and resolution.
        preprocessor: is given as many good pages at once as one request shows to the model.
        pages_per_request: that number of pages; None for all of them.

    Raises:
        ItemError: the document cannot be opened or is over a budget, or no page of it can be shown.
    """
    decoder, pages = _open(kind, paths, media)
    loaded, window = Pages(decoder), []
    with contextlib.closing(pages):
        for number, page in enumerate(pages):
            if isinstance(page, ItemError):
                loaded.failed.append(FailedPage(number, page.error_type, str(page)))
                continue
            if page.partial:
                loaded.cut_short.append((number, page.partial))
            window.append((number, page.pixels))
            if len(window) == pages_per_request:
                _prepare(window, preprocessor, loaded)
                window = []
    if window:
        _prepare(window, preprocessor, loaded)
    loaded.failed.sort(key=lambda failed: failed.page)
    if not loaded.inputs:
        first = loaded.failed[0]
        raise ItemError(first.error_type, (loaded.partial if len(loaded.failed) > 1 else None) or first.message)
    return loaded


def _prepare(window: Sequence[tuple[int, np.ndarray]], preprocessor: Preprocessor, loaded: Pages) -> None:
    """Bring one window's pages to model size; pages that one request cannot hold together fail together."""
    began_s = time.perf_counter()
    try:
        loaded.inputs += preprocessor.images([page for _, page in window])
    except PreprocessError as error:
        loaded.failed += [FailedPage(number, "unsupported_media", str(error)) for number, _ in window]
    loaded.preprocess_s += time.perf_counter() - began_s


def _open(kind: MediaKind, paths: Sequence[str], media: MediaConfig) -> tuple[str, Generator[Page, None, None]]:
    if kind != "document":
        return "pillow", _pictures(paths, media)
    (path,) = paths
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise ItemError("empty_media", "the file has zero bytes")
    if b"%PDF-" in head:
        return "pypdfium2", _render(path, media)
    if head.startswith(_TIFF_HEADS):
        return "pillow", load_image_pages(path, media)
    raise ItemError("unsupported_media", f"neither a PDF nor a TIFF (first bytes {head[:12].hex(' ')})")


def _pictures(paths: Sequence[str], media: MediaConfig) -> Generator[Page, None, None]:
    check_num_pages(len(paths), media)
    for path in paths:
        try:
            yield load_picture(path, media.max_pixels_per_frame)
        except ItemError as error:
            yield error


def check_num_pages(num_pages: int, media: MediaConfig) -> None:
    """Raise for a document without pages, or with too many, before the first page is made."""
    if num_pages == 0:
        raise ItemError("empty_media", "the document has no pages")
    if num_pages > media.max_pages:
        raise ItemError("too_large", f"the document has {num_pages:,} pages; max_pages is {media.max_pages:,}")


def _render(path: str, media: MediaConfig) -> Generator[Page, None, None]:
    """Yield a PDF's pages as shown: rotated by their /Rotate, with forms and annotations, on white."""
    import pypdfium2

    document = _open_pdf(path)
    with contextlib.closing(document):
        check_num_pages(len(document), media)
        for number in range(len(document)):
            try:
                yield Picture(_render_page(document, number, media))
            except pypdfium2.PdfiumError:
                yield ItemError("corrupt_media", f"the page cannot be read: {_NO_REASON}")
            except ItemError as error:
                yield error


def _open_pdf(path: str) -> pypdfium2.PdfDocument:
    """Open a PDF, in a PDFium that has seen no other.

    PDFium keeps the fonts that it takes for missing ones, and draws the next document's text otherwise with them; begun
    anew, it draws a document alike whichever came before. It takes a tenth of a millisecond.

    It keeps the code of its last error, too, and gives it again for a file that it refuses without a code. So a known
    error is made first: where its code stands afterwards, PDFium gave none.

    Raises:
        ItemError: ``encrypted_document``, ``dynamic_form`` or ``corrupt_media``.
    """
    import pypdfium2
    import pypdfium2.raw as pdfium
    from pypdfium2 import _library_scope  # no public name; it closes what is still open, which raw calls would not

    _library_scope.destroy_lib()
    _library_scope.init_lib()
    pdfium.FPDF_LoadDocument(b"", None)
    try:
        document = pypdfium2.PdfDocument(path)
        if document.get_formtype() == pdfium.FORMTYPE_XFA_FULL:
            document.close()
            raise ItemError(
                "dynamic_form",
                "the PDF is a dynamic XFA form, whose only page asks for another reader; open it in Adobe Acrobat and "
                "print it to a PDF",
            )
        document.init_forms()  # must come before a page is read; the wheels have no JavaScript
    except pypdfium2.PdfiumError as error:
        code = error.err_code
        if code in _ENCRYPTED:
            why = "a password" if code == _WRONG_PASSWORD else "a security handler that is not known"
            raise ItemError("encrypted_document", f"the PDF is encrypted and opens with {why} only") from error
        raise ItemError("corrupt_media", f"the PDF cannot be opened: {_REASONS.get(code, _NO_REASON)}") from error
    return document


def _render_page(document: pypdfium2.PdfDocument, number: int, media: MediaConfig) -> np.ndarray:
    """Render one page: uint8 [H, W, 3]."""
    page = document[number]
    with contextlib.closing(page):
        scale = media.page_dpi / _POINTS_PER_INCH
        sides = [side * scale for side in page.get_size()]
        if not all(math.isfinite(side) and side > 0 for side in sides):
            raise ItemError("corrupt_media", f"the page has no size: {sides[0]} x {sides[1]} px")
        width, height = (math.ceil(side) for side in sides)
        if width * height > media.max_pixels_per_frame:
            raise ItemError(
                "too_large",
                f"the page has {width:,} x {height:,} px at page_dpi = {media.page_dpi}; "
                f"max_pixels_per_frame is {media.max_pixels_per_frame:,}",
            )
        bitmap = page.render(scale=scale, rev_byteorder=True)
        with contextlib.closing(bitmap):
            return np.ascontiguousarray(bitmap.to_numpy()[..., :3])  # a copy: rows are padded to four bytes

"""Renders documents to pages: PDFs by PDFium, TIFFs by Pillow; pictures are pages already. Runs in the sandbox child.

Pages are made one window at a time, so that a long document takes the memory of its tiles and not of its pages. A page
that cannot be shown fails alone. A document fails as a whole where all of its pages fail. Of one that has too many
pages the first are read.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from illava.errors import PreprocessError
from pipeline.errors import ItemError
from pipeline.loading.decoding.pictures import Picture, load_image_pages, load_picture
from pipeline.loading.page_limit import num_pages_read, page_limit
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
        limit: how many pages are read at most.
        limit_key: what limits them, in words.
        num_pages: pages that the document has.
        inputs: one for each page that could be shown, in order, at model size.
        failed: the other pages.
        cut_short: pages among the first of which a part is missing, each with what is missing.
        decoder: ``pypdfium2`` or ``pillow``.
        preprocess_s: seconds of bringing pages to model size.
    """

    limit: int
    limit_key: str
    num_pages: int = 0
    decoder: str = ""
    inputs: list[VisualInput] = field(default_factory=list)
    failed: list[FailedPage] = field(default_factory=list)
    cut_short: list[tuple[int, str]] = field(default_factory=list)
    preprocess_s: float = 0.0

    @property
    def partial(self) -> str | None:
        """Names the pages that failed or are cut short; None where there is none."""
        if not self.failed:
            return self.notes
        first, total = self.failed[0], len(self.inputs) + len(self.failed)
        failed = f"{len(self.failed)} of {total} pages failed; page {first.page + 1}: {first.message}"
        return f"{failed}; {self.notes}" if self.notes else failed

    @property
    def notes(self) -> str | None:
        """Says what is missing beside the pages that failed; None where nothing is."""
        parts = [f"page {page + 1}: {what}" for page, what in self.cut_short]
        if self.num_pages > self.limit:
            read = f"the first {self.limit:,} were read" if self.limit > 1 else "the first was read"
            parts.append(f"the document has {self.num_pages:,} pages, {read}: {self.limit_key} is {self.limit:,}")
        return "; ".join(parts) or None


def load_pages(
    kind: MediaKind,
    paths: Sequence[str],
    media: MediaConfig,
    preprocessor: Preprocessor,
    *,
    pages_per_request: int | None,
    lost: Sequence[FailedPage] = (),
    num_pages: int | None = None,
    passwords: Sequence[str] = (),
) -> Pages:
    """Load every page at model size.

    Args:
        kind: ``document`` for one PDF or TIFF; ``image`` or ``images`` for pictures, each a page.
        paths: local files.
        media: budgets and resolution.
        preprocessor: is given as many good pages at once as one request shows to the model.
        pages_per_request: that number of pages; None for all of them.
        lost: page images that no path stands for, since their objects could not be had.
        num_pages: page images that the document has, where more are there than are read.
        passwords: to be tried on an encrypted PDF, in order.

    Raises:
        ItemError: the document cannot be opened or is over a budget, or no page of it can be shown.
    """
    limit_key, limit = page_limit(kind, media)
    loaded, window = Pages(limit, limit_key), []
    if kind == "document":
        pages = _open(paths[0], media, loaded, in_windows=pages_per_request is not None, passwords=passwords)
    else:
        loaded.decoder, loaded.num_pages = "pillow", num_pages or len(paths) + len(lost)
        pages = _pictures(paths, lost, media)
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


def _open(
    path: str, media: MediaConfig, loaded: Pages, *, in_windows: bool, passwords: Sequence[str]
) -> Generator[Page, None, None]:
    """Yield a document's pages; say in ``loaded`` by what, and how many there are."""

    def begin(num_pages: int) -> int:
        loaded.num_pages = num_pages
        return num_pages_read("document", num_pages, media, in_windows=in_windows)

    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise ItemError("empty_media", "the file has zero bytes")
    if b"%PDF-" in head:
        loaded.decoder = "pypdfium2"
        return _render(path, media, begin, passwords)
    if head.startswith(_TIFF_HEADS):
        loaded.decoder = "pillow"
        return load_image_pages(path, media.max_pixels_per_frame, begin)
    raise ItemError("unsupported_media", f"neither a PDF nor a TIFF (first bytes {head[:12].hex(' ')})")


def _pictures(paths: Sequence[str], lost: Sequence[FailedPage], media: MediaConfig) -> Generator[Page, None, None]:
    """Yield page images in order; a file that is gone or may not be read is lost too."""
    errors = {page.page: ItemError(page.error_type, page.message) for page in lost}
    left = iter(paths)
    for number in range(len(paths) + len(lost)):
        if number in errors:
            yield errors[number]
            continue
        try:
            yield load_picture(next(left), media.max_pixels_per_frame)
        except ItemError as error:
            yield error
        except FileNotFoundError:
            yield ItemError("not_found", "the file is gone")
        except PermissionError:
            yield ItemError("access_denied", "the file may not be read")


def _render(
    path: str, media: MediaConfig, begin: Callable[[int], int], passwords: Sequence[str]
) -> Generator[Page, None, None]:
    """Yield a PDF's pages as shown: rotated by their /Rotate, with forms and annotations, on white."""
    import pypdfium2

    document = _open_pdf(path, passwords)
    with contextlib.closing(document):
        for number in range(begin(len(document))):
            try:
                yield Picture(_render_page(document, number, media))
            except pypdfium2.PdfiumError:
                yield ItemError("corrupt_media", f"the page cannot be read: {_NO_REASON}")
            except ItemError as error:
                yield error


def _open_pdf(path: str, passwords: Sequence[str] = ()) -> pypdfium2.PdfDocument:
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
        document = _unlocked(path, passwords)
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
            raise ItemError("encrypted_document", _why_locked(code, len(passwords))) from error
        raise ItemError("corrupt_media", f"the PDF cannot be opened: {_REASONS.get(code, _NO_REASON)}") from error
    return document


def _unlocked(path: str, passwords: Sequence[str]) -> pypdfium2.PdfDocument:
    """Open a PDF without a password, else with each of these; raises PDFium's error of the last try."""
    import pypdfium2

    for password in (None, *passwords[:-1]):
        try:
            return pypdfium2.PdfDocument(path, password)
        except pypdfium2.PdfiumError as error:
            if error.err_code != _WRONG_PASSWORD or not passwords:
                raise
    return pypdfium2.PdfDocument(path, passwords[-1])


def _why_locked(code: int, num_passwords: int) -> str:
    if code != _WRONG_PASSWORD:
        return "the PDF is encrypted and opens with a security handler that is not known only"
    if num_passwords:
        return "the PDF is encrypted, and the password that was given for it does not open it"
    return (
        "the PDF is encrypted and opens with a password only; give it in the manifest's column `password`, or in "
        "ILLAVA_PDF_PASSWORD, and retry with --only encrypted_document"
    )


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

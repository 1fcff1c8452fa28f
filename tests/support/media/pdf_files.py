"""Writes small PDFs by hand, whose pages can be told apart, and provides a model that reads them."""

from __future__ import annotations

import time
from pathlib import Path

from illava.requests import Generation, Timing, TokenUsage
from pipeline.execution.worker import VLMWorker
from tests.support.runs.fakes import FakeVLM

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
PAGE_WIDTH, PAGE_HEIGHT = 144, 72  # points


def shade(number: int) -> int:
    """The grey of page ``number``."""
    return 20 + 5 * number


def page(number: int, *, rotate: int = 0, box: str | None = None) -> tuple[str, str]:
    """A grey page that tells its number, red in the top left corner and clockwise on green, blue, yellow, unrotated."""
    places = ((0, 62), (134, 62), (134, 0), (0, 0))
    fills = [f"{shade(number) / 255:.5f} g 0 0 {PAGE_WIDTH} {PAGE_HEIGHT} re f"]
    for (x, y), colour in zip(places, (RED, GREEN, BLUE, YELLOW), strict=True):
        red, green, blue = (part // 255 for part in colour)
        fills.append(f"{red} {green} {blue} rg {x} {y} 10 10 re f")
    return f"/MediaBox [{box or f'0 0 {PAGE_WIDTH} {PAGE_HEIGHT}'}] /Rotate {rotate}", "\n".join(fills)


def pdf_bytes(objects: list[str], trailer: str = "") -> bytes:
    """Objects 1, 2, ... (the first is the catalog) as a file with a cross-reference table."""
    out, places = bytearray(b"%PDF-1.7\n"), []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    start, size = len(out), len(objects) + 1
    out += f"xref\n0 {size}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{place:010} 00000 n \n".encode() for place in places)
    return bytes(out + f"trailer << /Size {size} /Root 1 0 R {trailer} >>\nstartxref\n{start}\n%%EOF\n".encode())


def write_pdf(path: Path, pages: list[tuple[str, str]]) -> Path:
    """A PDF of those pages: (dictionary entries, content stream) each."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for n, (entries, content) in enumerate(pages):
        objects.append(f"<< /Type /Page /Parent 2 0 R {entries} /Contents {4 + 2 * n} 0 R >>")
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    path.write_bytes(pdf_bytes(objects))
    return path


class PageReader(FakeVLM):
    """Answers with the numbers of the pages it is shown, or with JSON of them.

    Args:
        answer: format of the answer, from ``{pages}``.
        broken: pages whose requests end as an error of those requests alone.
        error: that error.
    """

    def __init__(
        self, *, answer: str = "page {pages}", broken: tuple[int, ...] = (), error: Exception | None = None
    ) -> None:
        super().__init__()
        self._answer, self._broken_pages = answer, frozenset(broken)
        self._error = error or ValueError("a defect of this request alone")
        self.shown: list[tuple[str, list[int], int]] = []

    def step(self) -> list[Generation]:
        request, since_s = self._queue.popleft()
        media = [part for part in request.content if not isinstance(part, str)]
        numbers = [round((int(m.tiles[0][m.tiles.shape[1] // 2, m.tiles.shape[2] // 2, 0]) - 20) / 5) for m in media]
        self.shown.append((request.request_id, numbers, request.sampling.seed))
        began_s = time.perf_counter()
        time.sleep(0.02)
        vision_s = time.perf_counter() - began_s
        self.device_busy_s += vision_s
        timing = Timing(queue_s=began_s - since_s, vision_s=vision_s, prefill_s=0.0, decode_s=0.0, device_s=vision_s)
        if not self._broken_pages.isdisjoint(numbers):
            return [Generation(request.request_id, "", (), None, None, timing, error=self._error)]
        text = self._answer.replace("{pages}", ", ".join(map(str, numbers)))
        usage = TokenUsage(
            100 * len(media), 48 * len(media), 25 * len(media), 12 * len(media), 6 * len(media), 100 * len(media), 5
        )
        return [Generation(request.request_id, text, (1, 2), "stop", usage, timing)]


def page_worker(config, run_info, **options) -> VLMWorker:
    """A worker around a `PageReader`."""
    return VLMWorker(config, run_info, vlm=PageReader(**options))

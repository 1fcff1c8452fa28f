"""Asks about pages window by window, and puts the answers back beside their pages.

What the model answered to a window stands with the window's first page; on its other pages text and counts are null,
so the counts of all pages sum to the row's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import DocumentConfig
from pipeline.errors import classify
from pipeline.json_schema import InvalidAnswerError, read_json
from pipeline.records import LoadedItem, MediaItem
from pipeline.storage.uris import printable
from pipeline.tasks.base import ParsedAnswer, Task
from pipeline.tasks.grammar import grammar_fault, why_cut

if TYPE_CHECKING:
    from illava.preprocess import VisualInput
    from illava.requests import Generation

_MESSAGE_CHARS = 500


@dataclass(frozen=True, slots=True)
class PageRow:
    """Holds one entry of a row's ``pages``.

    Attributes:
        page: from 0.
        window: the request that the page was in, from 0; None where it was in none.
        status: ``ok`` or ``failed``.
        error_type, error_message: of a failed page, as a row has them.
        text: the model's answer to the window.
        fields: the answer as the JSON that was asked for, in one line.
        finish_reason: of the answer.
        num_vision_tokens, num_vision_tokens_kept, num_decoder_tokens_kept, num_generated_tokens: of the window.
    """

    page: int
    window: int | None = None
    status: str = "ok"
    error_type: str | None = None
    error_message: str | None = None
    text: str | None = None
    fields: str | None = None
    finish_reason: str | None = None
    num_vision_tokens: int | None = None
    num_vision_tokens_kept: int | None = None
    num_decoder_tokens_kept: int | None = None
    num_generated_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Document(Task):
    """Gives every window of pages the same prompt; a manifest's ``prompt`` column overrides the job's."""

    config: DocumentConfig

    @property
    def media_per_request(self) -> int:
        return self.config.pages_per_request

    def own_prompt(self, item: MediaItem) -> str:
        return item.prompt or self.config.prompt

    @property
    def json_schema(self) -> dict[str, Any] | None:
        return self.config.json_schema if self.config.has_grammar else None

    def prompt(self, item: MediaItem) -> str:
        asked = Task.prompt(self, item)
        if self.config.json_schema is None:
            return asked
        schema = json.dumps(self.config.json_schema, ensure_ascii=False)
        return f"{asked}\nAnswer with JSON of this JSON schema and nothing else:\n{schema}"

    def parse(self, item: MediaItem, text: str) -> ParsedAnswer:
        return ParsedAnswer()

    def requests(self, item: MediaItem, media: tuple[VisualInput, ...]) -> list[tuple[str | VisualInput, ...]]:
        size = self.config.pages_per_request
        return [self.content(item, media[start : start + size]) for start in range(0, len(media), size)]

    def pages(self, loaded: LoadedItem, generations: Sequence[Generation]) -> tuple[dict[str, Any], ...]:
        size, num_pages = self.config.pages_per_request, len(loaded.media) + len(loaded.failed_pages)
        found = {page.page: _failed(page.page, None, page.error_type, page.message) for page in loaded.failed_pages}
        shown = [number for number in range(num_pages) if number not in found]
        for window, generation in enumerate(generations):
            first, *others = shown[window * size : (window + 1) * size]
            answered = found[first] = self._answered(first, window, generation)
            for number in others:
                found[number] = PageRow(number, window, answered.status, answered.error_type, answered.error_message)
        return tuple(asdict(found[number]) for number in range(num_pages))

    def _answered(self, page: int, window: int, generation: Generation) -> PageRow:
        if generation.error is not None:
            return _failed(page, window, *classify(generation.error), **_counts(generation))
        answer: dict[str, Any] = {
            "text": generation.text,
            "finish_reason": generation.finish_reason,
            **_counts(generation),
        }
        if self.config.json_schema is None:
            if fault := grammar_fault(generation):
                return _failed(page, window, "invalid_answer", fault, **answer)
            return PageRow(page, window, **answer)
        try:
            return PageRow(page, window, fields=read_json(generation.text, self.config.json_schema), **answer)
        except InvalidAnswerError as error:
            return _failed(page, window, "invalid_answer", f"{why_cut(generation)}{error}", **answer)


def pages_outcome(pages: Sequence[dict[str, Any]], notes: str | None = None) -> dict[str, Any]:
    """Say what a document's row says of its pages: ok, partial where some failed, failed where all did.

    Args:
        pages: of the document, as the row has them.
        notes: what is missing of it beside the failed pages; it stands behind them.
    """
    failed = [page for page in pages if page["status"] == "failed"]
    if not failed:
        return {}
    first = failed[0]
    message = f"{len(failed)} of {len(pages)} pages failed; page {first['page'] + 1}: {first['error_message']}"
    message += f"; {notes}" if notes else ""
    if len(failed) < len(pages):
        return {"status": "partial", "error_message": message}
    return {"status": "failed", "error_type": first["error_type"], "error_message": message}


def _failed(page: int, window: int | None, error_type: str, message: str, **answer: Any) -> PageRow:
    return PageRow(page, window, "failed", error_type, printable(message, _MESSAGE_CHARS), **answer)


def _counts(generation: Generation) -> dict[str, Any]:
    names = ("num_vision_tokens", "num_vision_tokens_kept", "num_decoder_tokens_kept", "num_generated_tokens")
    return {name: getattr(generation.usage, name) for name in names} if generation.usage else {}

"""Defines what every task says of an item: prompt, order of content, parsed answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.records import LoadedItem, MediaItem

if TYPE_CHECKING:
    from illava.preprocess import VisualInput
    from illava.requests import Generation


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """Holds what a task reads out of the model's text; both None where the text itself is the result."""

    answer: str | None = None
    score: float | None = None


class Task(ABC):
    """Words the requests of one kind of job and reads their answers. Subclasses are one level deep, without state."""

    @property
    def media_per_request(self) -> int | None:
        """How many of an item's media the model is shown at once; None for all of them."""
        return None

    @abstractmethod
    def prompt(self, item: MediaItem) -> str:
        """Word the text the model is given with the item's media."""

    @abstractmethod
    def parse(self, item: MediaItem, text: str) -> ParsedAnswer:
        """Read the answer in the model's text, and score it against the item's reference where there is one."""

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """The schema by which every answer is drawn; None where ``sampling.grammar`` decides."""
        return None

    def choices(self, item: MediaItem) -> tuple[tuple[str, ...], ...]:
        """Return, of each option an answer may begin with, the texts that name it; empty where there are none."""
        return ()

    def content(self, item: MediaItem, media: tuple[VisualInput, ...]) -> tuple[str | VisualInput, ...]:
        """Build one user turn: the media, then the prompt."""
        return (*media, self.prompt(item))

    def requests(self, item: MediaItem, media: tuple[VisualInput, ...]) -> list[tuple[str | VisualInput, ...]]:
        """Build the user turns of one item, each a request of its own; one is begun when the one before has ended."""
        return [self.content(item, media)]

    def pages(self, loaded: LoadedItem, generations: Sequence[Generation]) -> tuple[dict[str, Any], ...] | None:
        """Make the row's ``pages`` of the answers to `requests`; None where an item has no pages."""
        return None

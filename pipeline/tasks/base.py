"""Defines what every task says of an item: prompt, order of content, parsed answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.config.prompt_template import fill_template
from pipeline.records import LoadedItem, MediaItem
from pipeline.tasks.answers import lettered

if TYPE_CHECKING:
    from illava.preprocess import VisualInput
    from illava.requests import Generation

# Columns by their names in a prompt template. Any other column of the user's manifest is in the item's ``fields``.
TEMPLATE_COLUMNS = {
    "item_id": "item_id",
    "id": "item_id",
    "media_kind": "media_kind",
    "prompt": "prompt",
    "question": "prompt",
    "question_id": "question_id",
    "category": "category",
    "reference": "reference",
}
LISTED_COLUMNS = ("item_id", "id", "uri", "media_kind")  # those of an item that was listed, not named by a manifest


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """Holds what a task reads out of the model's text; both None where the text itself is the result."""

    answer: str | None = None
    score: float | None = None


class Task(ABC):
    """Words the requests of one kind of job and reads their answers. Subclasses are one level deep, without state.

    Attributes:
        config: the job's ``task`` section.
    """

    config: Any

    @property
    def media_per_request(self) -> int | None:
        """How many of an item's media the model is shown at once; None for all of them."""
        return None

    def prompt(self, item: MediaItem) -> str:
        """Word the text the model is given with the item's media."""
        template = self.config.prompt_template
        return self.own_prompt(item) if template is None else fill_template(template, partial(column_of, item))

    @abstractmethod
    def own_prompt(self, item: MediaItem) -> str:
        """Word that text where the job has no ``prompt_template``."""

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


def column_of(item: MediaItem, name: str) -> str:
    """Return an item's value in a column of the manifest; options are one a line, with their letters.

    `pipeline.inputs.build_manifest` has refused columns without a value.
    """
    if name == "uri":
        return item.uris[0]
    if name == "options":
        return lettered(item.options or ())
    return getattr(item, TEMPLATE_COLUMNS[name]) if name in TEMPLATE_COLUMNS else item.fields[name]

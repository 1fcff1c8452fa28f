"""What is asked of the model and what its text means: prompt, order of content, parsed answer.

Knows nothing of storage, models or rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import CaptionConfig, TaskConfig
from pipeline.records import MediaItem

if TYPE_CHECKING:
    from illava.preprocess import VisualInput


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What a task reads out of the model's text; both None where the text itself is the result."""

    answer: str | None = None
    score: float | None = None


class Task(ABC):
    """One kind of job. Subclasses are one level deep and hold no state."""

    @abstractmethod
    def prompt(self, item: MediaItem) -> str:
        """The text the model is given with the item's media."""

    @abstractmethod
    def parse(self, item: MediaItem, text: str) -> ParsedAnswer:
        """The answer in the model's text, and its score against the item's reference where there is one."""

    def content(self, item: MediaItem, media: tuple[VisualInput, ...]) -> tuple[str | VisualInput, ...]:
        """One user turn: the media, then the prompt."""
        return (*media, self.prompt(item))


@dataclass(frozen=True, slots=True)
class Caption(Task):
    """One text per item; a manifest's ``prompt`` column overrides the job's."""

    default_prompt: str

    def prompt(self, item: MediaItem) -> str:
        return item.prompt or self.default_prompt

    def parse(self, item: MediaItem, text: str) -> ParsedAnswer:
        return ParsedAnswer()


def build_task(config: TaskConfig) -> Task:
    """The task a job's ``task`` section stands for."""
    if isinstance(config, CaptionConfig):
        return Caption(config.prompt)
    from pipeline.evaluation.questions import Question  # it is made of this module's `Task`

    return Question(config)

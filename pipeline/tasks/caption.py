"""Asks for one text per item and leaves it as the model wrote it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import CaptionConfig
from pipeline.records import MediaItem
from pipeline.tasks.base import ParsedAnswer, Task


@dataclass(frozen=True, slots=True)
class Caption(Task):
    """Asks for one text per item; a manifest's ``prompt`` column overrides the job's."""

    config: CaptionConfig

    def own_prompt(self, item: MediaItem) -> str:
        return item.prompt or self.config.prompt

    def parse(self, item: MediaItem, text: str) -> ParsedAnswer:
        return ParsedAnswer()
